"""What a PVT looks at: attention written out, pictures, and the page one clicks in."""

import base64
import json
import re
import shutil
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from conftest import run_main, write_config
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.registry import MODELS
from reference import VARIANTS, small

from pvt_mm.apis.inference import Predictor, read_pixels
from pvt_mm.config import datasets, load_config
from pvt_mm.errors import UserError
from pvt_mm.visualization import attention, page, pictures


def lively(variant, **kwargs):
    """Build a small backbone whose weights are so large that attention is far from uniform."""
    backbone = small(variant, **kwargs).eval()
    for name, weight in backbone.named_parameters():
        if weight.ndim > 1 and 'pos_embed' not in name:
            torch.nn.init.normal_(weight, std=1.5 * weight[0].numel() ** -0.5)
    return backbone


def watch(backbone, image, part):
    """Run the backbone and return the input and output of a part of each stage's last block."""
    seen = []
    hooks = [
        stage.blocks[-1]
        .get_submodule(part)
        .register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
        for stage in backbone.stages
    ]
    with torch.no_grad():
        backbone(image)
    for hook in hooks:
        hook.remove()
    return seen


def check_attention(variant, height, width):
    torch.manual_seed(height * 1000 + width)
    backbone, image = lively(variant), torch.randn(1, 3, height, width)
    # A hook on a block leaves it to the fast path; one on its attention does not.
    blocks, outputs = watch(backbone, image, ''), watch(backbone, image, 'attn')
    traces = attention.trace_stages(backbone, image)
    with torch.no_grad():
        for stage, trace, (x, whole), (_, output) in zip(backbone.stages, traces, blocks, outputs):
            found = attention.explicit_attention(trace.attn, trace.tokens)
            weights, (rows, columns) = found.weights, found.key_grid
            queries = output[0, ..., 0].numel()
            assert weights.shape[1:] == (trace.attn.num_heads, queries, rows * columns)
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
            if rows * columns > 1:
                assert weights.max() * rows * columns > 1.02, 'not uniform, so that a mix-up shows'
            again = attention.attention_output(trace.attn, found)
            torch.testing.assert_close(again, output.flatten(1, 2), atol=1e-5, rtol=1e-5)
            x = x + again.unflatten(1, x.shape[1:3])  # (B, H, W, dim)
            block = stage.blocks[-1]
            torch.testing.assert_close(whole, x + block.mlp(block.norm2(x)), atol=1e-4, rtol=1e-4)
            some = attention.explicit_attention(trace.attn, trace.tokens, [0])
            torch.testing.assert_close(some.weights, weights[:, :, :1])


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(sorted(VARIANTS)), st.integers(64, 150), st.integers(64, 150))
def test_attention_reproduces_its_block(variant, height, width):
    """Rows sum to 1, and weights x values, projected, are the block's own output."""
    check_attention(variant, height, width)


@pytest.mark.parametrize('variant', ['v1', 'v2', 'v2_li'])
def test_attention_reproduces_the_kernels(variant):
    """The same where the backbone attends in chunks, on a size that no ratio divides."""
    check_attention(variant, 234, 398)


def test_a_backbone_in_bf16_is_traced_in_fp32():
    """Attention is written out in the weights' dtype, near what the block computes in bf16."""
    backbone, image = lively('v2', compute_dtype='bfloat16'), torch.randn(1, 3, 64, 96)
    traces = attention.trace_stages(backbone, image)
    with torch.no_grad():
        for trace, (_, output) in zip(traces, watch(backbone, image, 'attn')):
            found = attention.explicit_attention(trace.attn, trace.tokens)
            again = attention.attention_output(trace.attn, found)
            error = (again - output.flatten(1, 2)).abs().mean() / output.abs().mean()
            assert again.dtype == torch.float32 and error < 0.05


@pytest.mark.parametrize(('variant', 'keyed'), [('v1', (8, 16)), ('v2_li', (15, 19))])
def test_keys_cover_whole_cells(variant, keyed):
    """Tokens beyond the last whole cell are in no key; pooled keys leave none out."""
    attn = small(variant).stages[0].blocks[-1].attn
    assert attention.keyed_tokens(attn, 15, 19) == keyed
    x = torch.randn(1, 15, 19, 16)
    changed = x.clone()
    changed[:, keyed[0] :] = 9.0
    changed[:, :, keyed[1] :] = 9.0
    assert torch.equal(attn.reduce(x), attn.reduce(changed))
    changed[:, keyed[0] - 1, keyed[1] - 1] += 1.0
    assert not torch.equal(attn.reduce(x), attn.reduce(changed))


# Geometry and colours


def stage_view(height, width, stride=8, variant='v2', stage=1):
    """Lay a stage's last attention over an image of so many network pixels."""
    attn = lively(variant).stages[stage].blocks[-1].attn
    rows, columns = -(-height // stride), -(-width // stride)
    tokens = torch.randn(1, rows + 2, columns + 1, attn.q.in_features)  # with padding
    trace = attention.StageTrace(tokens[0], attn, tokens, stride)
    return pictures.StageView(trace, (stride / height, stride / width))


def test_a_stage_knows_its_tokens_on_the_image():
    """Padding is left out, a point finds its token, and keys end with the last whole cell."""
    view = stage_view(100, 52)
    assert view.grid == (13, 7) and view.feature.shape[:2] == (13, 7)
    assert view.token_at(0, 0) == (0, 0) and view.token_at(0.999, 0.999) == (12, 6)
    assert view.token_at(25 / 52, 47 / 100) == (5, 3)
    assert view.key_extent == (12 * 8 / 100, 8 * 8 / 52), 'of 15 x 8 tokens, in cells of 4'


def test_a_map_is_laid_over_its_extent():
    """A key's place on the image is that of its tokens; what no key covers is 0."""
    wide = pictures.resize_map(np.ones((3, 2)), (0.5, 0.75), (40, 80))
    assert (wide[:20, :60] == 1).all() and wide.sum() == 20 * 60
    over = pictures.resize_map(np.eye(2), (1.5, 2.0), (40, 80))
    assert over.shape == (40, 80) and over[2, 5] == 1 and over[2, -1] < 1


def test_features_become_colours():
    """Components land in 0..1 and tell two regions apart; a constant feature is no error."""
    feature = np.zeros((6, 10, 8), dtype=np.float32)
    feature[:, 5:, :4] = 1
    colours = pictures.principal_colours(feature)
    assert colours.shape == (6, 10, 3) and colours.min() >= 0 and colours.max() <= 1
    assert np.abs(colours[0, 0] - colours[0, 9]).max() == 1
    assert np.isfinite(pictures.principal_colours(np.ones((3, 3, 2), dtype=np.float32))).all()


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 20_000))
def test_a_page_stays_small(rows, columns, size):
    """The step between asking tokens is the least that fits, down to a single token."""
    limit = page.ATTENTION_BYTES // 4
    step = page.query_step(rows, columns, size, limit)

    def total(step):
        return -(-rows // step) * -(-columns // step) * size

    assert total(step) <= limit
    assert step == 1 or total(step - 1) > limit


@pytest.mark.parametrize('limit', [10**6, 500])
def test_the_page_holds_the_weights(limit):
    """What the page decodes is what the attention computed, of all tokens or of every n-th."""
    view = stage_view(100, 52)
    data = page.stage_data(view, limit)
    step = data['step']
    assert (step > 1) == (limit == 500)
    shape = (*data['asked'], data['heads'], *data['keys'])
    weights = np.frombuffer(base64.b64decode(data['weights']), np.uint8).reshape(shape)
    assert weights.size <= limit
    peaks = np.frombuffer(base64.b64decode(data['peaks']), '<f4').reshape(*shape[:3], 1, 1)
    start = (step - 1) // 2
    for row, column in ((0, 0), (shape[0] - 1, shape[1] - 1), (1, 2)):
        (exact,) = view.attention([(start + row * step, start + column * step)])
        found = weights[row, column] * peaks[row, column] / 255
        np.testing.assert_allclose(found, exact, atol=float(peaks[row, column].max()) / 500)


# The tool


class Shown(NamedTuple):
    """What the tool wrote for an image, and what it was made from."""

    trained: tuple
    image: object
    out: object


@pytest.fixture(scope='module')
def shown(trained, demo_data, tmp_path_factory):
    """Run the tool once on a task's first validation image: shown('ins')."""
    results = {}

    def run(task):
        if task not in results:
            run_of = trained(task)
            folder = 'ade/images/validation' if task == 'seg' else 'coco/val2017'
            image = sorted((demo_data / folder).iterdir())[0]
            out = tmp_path_factory.mktemp(f'visualized_{task}')
            more = ('--query', '20,30', '--out-dir', out, *run_of.data, '--score-thr', 0)
            run_main(out, 'visualize', run_of.config, run_of.checkpoint, image, *more)
            results[task] = Shown(run_of, image, out)
        return results[task]

    return run


@pytest.mark.parametrize('task', ['ins', 'seg'])
def test_pictures_and_page_are_written(task, shown, monkeypatch):
    """Every picture is there, with ground truth found by the config; the page needs no network."""
    _, image, out = shown(task)
    sizes = {}
    for kind in ('features', 'attention', 'predictions'):
        picture = cv2.imread(str(out / f'{image.stem}_{kind}.png'))
        assert picture.std() > 10
        sizes[kind] = picture.shape[:2]
    height, width = read_pixels(image).shape[:2]
    three = width / height * 3
    ratio = sizes['predictions'][1] / sizes['predictions'][0]
    assert three * 0.8 < ratio < three * 1.1, 'image, ground truth and prediction side by side'
    page = (out / f'{image.stem}.html').read_text()
    assert len(page) < 8e6
    assert not re.search(r'(src|href)="(?!data:)|https?://|@import|url\(', page)


def coco_of(demo_data):
    return demo_data / 'coco/annotations/instances_val2017.json'


def test_boxes_and_masks_of_the_truth(demo_data, config):
    """The truth of a detector's image is that of the annotation file, found by name and size."""
    content = json.loads(coco_of(demo_data).read_text())
    entry = content['images'][1]
    image = demo_data / 'coco/val2017' / entry['file_name']
    boxes = [a['bbox'] for a in content['annotations'] if a['image_id'] == entry['id']]
    cfg = config('ins', demo_data / 'coco')
    for ann_file in (None, str(coco_of(demo_data))):
        instances = pictures.find_truth(cfg, image, ann_file).gt_instances
        found = instances.bboxes.numpy()
        np.testing.assert_allclose(found[:, :2], np.array(boxes)[:, :2], atol=1e-3)
        np.testing.assert_allclose(found[:, 2:] - found[:, :2], np.array(boxes)[:, 2:], atol=1e-3)
        assert instances.masks.shape == (len(boxes), entry['height'], entry['width'])
        assert instances.masks.flatten(1).any(1).all()


def test_label_map_of_the_truth(demo_data, config):
    """A segmentor's truth is the label map beside the image, its zero ignored."""
    image = sorted((demo_data / 'ade/images/validation').iterdir())[1]
    labels = cv2.imread(
        str(demo_data / 'ade/annotations/validation' / f'{image.stem}.png'), cv2.IMREAD_UNCHANGED
    )
    found = pictures.find_truth(config('seg', demo_data / 'ade'), image).gt_sem_seg.data[0]
    np.testing.assert_array_equal(found.numpy(), np.where(labels == 0, 255, labels - 1.0))


def test_an_image_without_truth_has_none(demo_data, config, tmp_path):
    """Another image of a name that the data set has is not given its annotations."""
    image = sorted((demo_data / 'coco/val2017').iterdir())[0]
    cv2.imwrite(str(tmp_path / image.name), read_pixels(image)[5:])
    cfg = config('ins', demo_data / 'coco')
    assert pictures.find_truth(cfg, tmp_path / image.name) is None
    assert pictures.find_truth(config('ins', tmp_path), image) is None, 'the data is elsewhere'
    with pytest.raises(UserError, match='does not list one image'):
        pictures.find_truth(cfg, tmp_path / image.name, str(coco_of(demo_data)))
    shutil.copy(image, tmp_path / 'other.jpg')
    assert pictures.find_truth(cfg, tmp_path / 'other.jpg') is None


def test_other_annotations_are_refused(demo_data, config, tmp_path):
    """A file of other classes, none of COCO's, and one for a segmentor: a sentence each."""
    image = sorted((demo_data / 'coco/val2017').iterdir())[0]
    cfg = config('ins', demo_data / 'coco')
    (tmp_path / 'x.json').write_text('{"categories": [{"id": 1, "name": "zebra"}]}')
    with pytest.raises(UserError, match='none of the classes of the config, zero, one'):
        pictures.find_truth(cfg, image, str(tmp_path / 'x.json'))
    with pytest.raises(UserError, match='no annotation file of COCO'):
        pictures.find_truth(cfg, image, str(image))
    with pytest.raises(UserError, match='--ann-file is for detectors'):
        pictures.find_truth(config('seg', demo_data / 'ade'), image, 'x.json')


def test_points_outside_are_refused(failing, demo_data, tmp_path):
    """The image is named with its size, before anything is loaded."""
    image = sorted((demo_data / 'coco/val2017').iterdir())[0]
    height, width = read_pixels(image).shape[:2]
    arguments = ('visualize', write_config(tmp_path, 'det'), 'x.pth', image, '--query')
    message = failing(*arguments, f'{width},0')
    assert f'outside of the image of {width} x {height} pixels; give X from 0 to' in message
    assert '--query 3 is no point' in failing(*arguments, '3')
    assert pictures.parse_point(None, np.zeros((10, 7, 3))) == (3, 5)
    assert pictures.parse_point('6,9', np.zeros((10, 7, 3))) == (6, 9)


def test_no_image_is_refused(failing, tmp_path):
    config = write_config(tmp_path, 'det')
    assert 'There is no image' in failing('visualize', config, 'x.pth', tmp_path / 'missing.jpg')
    (tmp_path / 'text.jpg').write_text('not a picture')
    message = failing('visualize', config, 'x.pth', tmp_path / 'text.jpg')
    assert 'no image that OpenCV can read' in message


def test_a_config_without_a_pvt_is_refused(failing, demo_data, tmp_path):
    resnet = "model['backbone'] = dict(_delete_=True, type='ResNet', depth=18)\n"
    resnet += "model['neck']['in_channels'] = [64, 128, 256, 512]"
    config = write_config(tmp_path, 'det', resnet)
    model = MODELS.build(load_config(str(config)).model)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'resnet.pth')
    image = sorted((demo_data / 'coco/val2017').iterdir())[0]
    message = failing('visualize', config, tmp_path / 'resnet.pth', image)
    assert 'The config has no PVT or PVTv2' in message


def test_padding_in_the_pipeline_moves_nothing(trained, demo_data):
    """A pipeline that pads the image itself lays tokens over it as one that does not."""
    run = trained('det')
    image = sorted((demo_data / 'coco/val2017').iterdir())[0]
    cells = []
    for pad in ([], [dict(type='Pad', size=(160, 192))]):
        cfg = load_config(str(run.config))
        data = next(datasets(cfg, ['test_dataloader']))
        data.pipeline[2:2] = pad
        data.pipeline[-1].meta_keys = ('ori_shape', 'img_shape', 'scale_factor')
        predictor = Predictor(cfg, str(run.checkpoint))
        view = pictures.view_image(predictor, image)
        cells.append([stage.cell for stage in view.stages])
    np.testing.assert_allclose(*cells, rtol=1e-6)


# The page in a browser

CHROMIUM_FLAGS = (
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
)


@pytest.fixture
def browser_page(shown):
    """Open the page without a network; fails on anything it complains of."""
    sync_api = pytest.importorskip('playwright.sync_api')
    chromium = shutil.which('chromium') or shutil.which('chromium-browser')
    if chromium is None:
        pytest.skip('there is no chromium')
    _, image, out = shown('ins')
    complaints = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        context = browser.new_context(viewport={'width': 1280, 'height': 900}, offline=True)
        page = context.new_page()
        page.on('console', lambda message: complaints.append(message.text))
        page.on('pageerror', lambda error: complaints.append(str(error)))
        page.on(
            'request',
            lambda asked: asked.url.startswith(('file:', 'data:')) or complaints.append(asked.url),
        )
        page.goto((out / f'{image.stem}.html').as_uri())
        page.wait_for_selector('button[aria-pressed=true]')
        yield page
        browser.close()
    assert not complaints


def look(page):
    """Return what the page shows: all canvases, and the text that names the point."""
    pictures = page.evaluate("[...document.querySelectorAll('canvas')].map(c => c.toDataURL())")
    return pictures, page.inner_text('#point')


def test_a_click_shows_where_each_head_looks(browser_page, shown):
    """Pointer and keys move the point, a small map becomes the large one; it fits its window."""
    page = browser_page
    states = [look(page)]
    assert states[0][1].endswith('x 20, y 30'), 'begins at --query'
    assert len(states[0][0]) == 2 + 1 + (1 + 2) + (1 + 5) + (1 + 8)

    box = page.locator('#image').bounding_box()
    height, width = read_pixels(shown('ins').image).shape[:2]
    for x, y in ((0.75, 0.25), (0.3, 0.8)):
        page.mouse.click(box['x'] + x * box['width'], box['y'] + y * box['height'])
        states.append(look(page))
        at = [int(number) for number in re.findall(r'\d+', states[-1][1])]
        assert abs(at[0] - x * width) <= 2 and abs(at[1] - y * height) <= 2
    for before, after in zip(states, states[1:]):
        assert before[1] != after[1]
        changed = [a != b for a, b in zip(before[0], after[0])]
        assert changed.pop(1) is False, 'the colour scale'
        assert all(changed), 'the large map and that of every stage and head'

    large = look(page)[0][0]
    page.get_by_role('button', name='stage 3, head 2').press('Enter')
    assert look(page)[0][0] != large
    assert 'stage 3, head 2' in page.inner_text('#shown')

    point = look(page)[1]
    page.focus('#image')
    page.keyboard.press('ArrowRight')
    moved = look(page)[1]
    page.keyboard.press('Shift+ArrowUp')
    assert len({point, moved, look(page)[1]}) == 3

    for side in (1280, 800, 400):
        page.set_viewport_size({'width': side, 'height': 900})
        assert page.evaluate('document.documentElement.scrollWidth') <= side
