"""The documentation: every block and command, what pages say of the code, and the site itself."""

import ast
import importlib
import re
import shutil
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from commands import check, is_command, parser_of, split
from conftest import forget_runs, run_main, write_config
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import ManagerMixin
from recipes import read_metafile
from reference import REPO, load_json

import pvt_mm
from pvt_mm.config import load_config

PAGES = [REPO / 'README.md', *sorted((REPO / 'docs').glob('*.md'))]
#: What a marker may say that a block needs, so that it is not run here: <!-- needs: COCO, GPU -->
#: Another form names the test that runs it: <!-- run by: tests/tools/test_tools.py -->
NEEDS = {'COCO', 'ADE20K', 'ImageNet', 'GPU', 'network', 'slurm', 'minutes', 'checkpoint'} | {
    'conda',
    'docker',
}
#: Tools whose commands are run here, and what makes them small.
RUN_HERE = {
    'make_demo_data': ('--train', '6', '--val', '2'),
    'check_dataset': (),
    'swap_backbone': (),
    'convert_checkpoint': (),
}
PLACEHOLDER = re.compile(r'[A-Z][A-Z_]+(\.[a-z]+)?')


class Block(NamedTuple):
    """A block of code on a page."""

    page: str
    line: int
    kind: str  # bash, python or another
    title: str
    text: str
    needs: frozenset

    def __str__(self):
        return f'{self.page}:{self.line}'


@pytest.fixture(autouse=True, scope='module')
def quick_configs():
    """Parse mmdet's metafiles once, and write configs as they are, which yapf takes seconds for."""
    with (
        mock.patch('mmengine.config.utils.load', read_metafile),
        # The fork has no yapf.
        mock.patch(
            'mmengine.config.config.FormatCode', lambda text, **style: (text, True), create=True
        ),
    ):
        yield


def read_blocks(page):
    """Return the fenced blocks of a page, and the indented ones that are commands."""
    lines = page.read_text().splitlines()
    blocks, needs, i = [], frozenset(), 0
    while i < len(lines):
        start, line = i, lines[i]
        fence = re.match(r'``` ?(\w*)(?:.*title="(.+)")?', line)
        i += 1
        if marker := re.fullmatch(r'<!-- (?:needs|run by): (.+) -->', line):
            needs = frozenset(marker[1].split(', '))
            continue
        if fence:
            while not lines[i].startswith('```'):
                i += 1
            text, kind, title = lines[start + 1 : i], fence[1], fence[2] or ''
            i += 1
        elif line.startswith('    ') and not lines[start - 1].strip() and is_command(line):
            while i < len(lines) and lines[i].startswith('    '):
                i += 1
            text, kind, title = [line[4:] for line in lines[start:i]], 'bash', ''
        else:
            needs = needs if not line.strip() else frozenset()
            continue
        blocks.append(Block(page.name, start + 1, kind, title, '\n'.join(text) + '\n', needs))
        needs = frozenset()
    return blocks


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
PYTHON = [block for block in BLOCKS if block.kind == 'python']
COMMANDS = [block for block in BLOCKS if block.kind == 'bash']


def made_on(page):
    """The files that a page tells to write."""
    return {block.title for block in BLOCKS if block.page == page and block.title}


def names_of_package(tree):
    """Yield the dotted names of pvt_mm that Python code uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith('pvt_mm'))
        elif isinstance(node, ast.ImportFrom) and node.module.startswith('pvt_mm'):
            yield from (f'{node.module}.{alias.name}' for alias in node.names)
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if re.fullmatch(r'pvt_mm(\.\w+)+', name):
                yield name


def exists(name):
    """Tell whether a dotted name of pvt_mm is a module, or in one."""
    parts = name.split('.')
    thing = pvt_mm
    for i, part in enumerate(parts[1:], 2):
        if not hasattr(thing, part):
            try:
                importlib.import_module('.'.join(parts[:i]))
            except ImportError:
                return False
        thing = getattr(thing, part)
    return True


def test_blocks_are_found():
    """The reader finds fenced and indented blocks, markers and titles."""
    found = {(block.page, block.kind) for block in BLOCKS}
    assert {('README.md', 'bash'), ('README.md', 'python'), ('weights.md', 'bash')} <= found
    assert len(COMMANDS) > 20 and len(PYTHON) > 10
    assert made_on('custom_data.md') == {'configs/my_detector.py'}
    assert any({'GPU', 'slurm'} <= block.needs for block in BLOCKS)


@pytest.mark.parametrize('block', BLOCKS, ids=str)
def test_block_is_of_a_known_kind(block):
    """A block says what it is, and a marker says something that is known."""
    assert block.kind in ('bash', 'python', 'text'), 'say ```bash, ```python or ```text'
    tests = {need for need in block.needs if need.startswith('tests/')}
    assert block.needs - tests <= NEEDS, f'a marker may say {", ".join(sorted(NEEDS))}'
    for test in tests:
        text = (REPO / test).read_text()
        for tool in re.findall(r'tools/(?:\w+/)?(\w+)\.', block.text):
            assert tool in text, f'{test} does not run tools/{tool}'


@pytest.mark.parametrize('block', COMMANDS, ids=str)
def test_commands_are_taken(block):
    """Tools, files, flags and targets exist; what is not run here says why."""
    for words in split(block.text):
        check(words, made_on(block.page))
        tool = Path(next((word for word in words if word.startswith('tools/')), '')).stem
        form = any(PLACEHOLDER.fullmatch(word) for word in words)
        assert block.needs or form or tool in RUN_HERE or words[0] == '.', (
            f'{" ".join(words)}: say what it needs in a line before, <!-- needs: COCO -->, or add '
            'the tool to RUN_HERE'
        )


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_commands_in_sentences_are_taken(page):
    """Commands in a text or table, between backticks, are such as the tools take."""
    text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for found in re.findall(r'`([^`\n]+)`', text):
        if is_command(found) and ' ' in found and not re.match(r'[A-Z_]+=\S+$', found):
            for words in split(found.replace(' ...', '')):
                check(words, made_on(page.name))


@pytest.mark.parametrize('block', PYTHON, ids=str)
def test_python_compiles_and_its_names_exist(block):
    """A Python block compiles, and what it names of pvt_mm is there."""
    for name in names_of_package(ast.parse(block.text)):
        assert exists(name), f'there is no {name}'


def is_config(block):
    return '_base_' in block.text


@pytest.mark.parametrize('block', [b for b in PYTHON if is_config(b) and not b.needs], ids=str)
def test_configs_load(block, tmp_path):
    """A config on a page loads among our configs, and its backbone can be built."""
    file = link_repository(tmp_path) / (block.title or 'configs/leaf.py')
    file.write_text(block.text)
    cfg = Config.fromfile(file)
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        backbone = MODELS.build(dict(cfg.model.backbone, init_cfg=None))
    assert backbone.out_channels


def link_repository(folder):
    """Link what a clone has into a folder, so that relative paths hold and nothing is written."""
    (folder / 'configs').mkdir()
    for item in (REPO / 'configs').iterdir():
        (folder / 'configs' / item.name).symlink_to(item)
    return folder


@pytest.fixture(scope='module')
def clone(tmp_path_factory, demo_data):
    """A folder with the files that pages speak of: configs, data, weights, a trained model."""
    folder = link_repository(tmp_path_factory.mktemp('clone'))
    shutil.copytree(demo_data, folder / 'data' / 'demo')
    (folder / 'weights').mkdir()
    shapes = load_json('checkpoint_keys.json')['small']['official']
    weights = {key: torch.zeros(shape) for key, shape in shapes.items()}
    torch.save(weights, folder / 'weights' / 'pvt_small.pth')
    write_config(folder, 'det').rename(folder / 'my_config.py')
    for scope, config, name in (
        ('mmdet', 'demo_retinanet_pvt_t.py', 'digits/epoch_15.pth'),
        ('mmseg', 'demo_fpn_pvt_t.py', 'masks/iter_600.pth'),
    ):
        cfg = load_config(str(folder / 'configs' / config))
        init_default_scope(scope)
        trained = folder / 'work_dirs' / name
        trained.parent.mkdir(parents=True)
        torch.save({'meta': {}, 'state_dict': MODELS.build(cfg.model).state_dict()}, trained)
    return folder


SCRIPTS = [block for block in PYTHON if not is_config(block) and not block.needs]


@pytest.mark.parametrize('page', sorted({block.page for block in SCRIPTS}))
def test_scripts_run(page, clone, monkeypatch):
    """The Python of a page runs, block after block, in a folder with the files that it names."""
    forget_runs(ManagerMixin)
    monkeypatch.chdir(clone)
    names = {}
    for block in SCRIPTS:
        if block.page == page:
            exec(compile(block.text, str(block), 'exec'), names)


RUN = [
    (block.page, words)
    for block in COMMANDS
    for words in split(block.text)
    if not block.needs
    and Path(words[-1 if len(words) == 1 else 1]).stem in RUN_HERE
    and not made_on(block.page)  # those pages are run as a whole below
    and not any(PLACEHOLDER.fullmatch(word) for word in words)
]


@pytest.mark.parametrize(('page', 'words'), RUN, ids=[f'{page}:{words[1]}' for page, words in RUN])
def test_commands_run(page, words, clone, capsys):
    """Commands without a marker run, and end with 0."""
    tool = Path(words[1]).stem
    try:
        run_main(clone, tool, *words[2:], *RUN_HERE[tool])
    except SystemExit as end:
        assert not end.code, capsys.readouterr()
    if '--inspect' in words:
        text = (REPO / 'docs' / page).read_text()
        shown = re.search(r'format .*?backbone [^\n]*\n', text, re.DOTALL)[0]
        shown = [line.strip() for line in shown.splitlines()]
        assert shown == capsys.readouterr().out.splitlines()[: len(shown)], 'as the page shows it'


SMALL_IMAGES = [
    f'{key}.scale=(64,64)'
    for key in (
        'train_dataloader.dataset.pipeline.2',
        'val_dataloader.dataset.pipeline.1',
        'test_dataloader.dataset.pipeline.1',
    )
]
CUSTOM = {
    'custom_data.md': ('epoch_1.pth', ['train_cfg.max_epochs=1', *SMALL_IMAGES]),
    'custom_masks.md': ('iter_3.pth', ['train_cfg.max_iters=3', 'train_cfg.val_interval=3']),
}


@pytest.mark.parametrize('page', CUSTOM)
def test_worked_example_trains(page, tmp_path, capsys):
    """The config of the page, on data made as it says, is checked, trained, tested and applied."""
    folder = link_repository(tmp_path)
    (block,) = [block for block in PYTHON if block.page == page and block.title]
    (folder / block.title).write_text(block.text)
    name, options = CUSTOM[page]
    commands = [words for b in COMMANDS if b.page == page for words in split(b.text)]
    tools = [Path(words[1]).stem for words in commands]
    assert tools == ['make_demo_data', 'check_dataset', 'train', 'test', 'infer']
    in_process = [
        f'{loader}_dataloader.{key}'
        for loader in ('train', 'val', 'test')
        for key in ('num_workers=0', 'persistent_workers=False')
    ]
    light = 'default_hooks.checkpoint.save_optimizer=False'
    short = ['model.backbone.init_cfg=None', light, *options, *in_process]
    extra = {'make_demo_data': RUN_HERE['make_demo_data'], 'train': ('--cfg-options', *short)}
    extra['test'] = ('--cfg-options', *in_process, *(o for o in options if o in SMALL_IMAGES))
    for words, tool in zip(commands, tools):
        arguments = [re.sub(r'(epoch|iter)_\d+\.pth', name, word) for word in words[2:]]
        try:
            run_main(folder, tool, *arguments, *extra.get(tool, ()))
        except SystemExit as end:
            assert not end.code, capsys.readouterr()
    assert list((folder / 'outputs').glob('*.json'))
    assert (folder / ('out' if page == 'custom_data.md' else 'labels')).is_dir()


# What pages say


def test_arguments_in_the_readme_exist():
    """Each tool that the README's table names for an argument has it."""
    options = {name: parser_of(name)._option_string_actions for name in ('train', 'test', 'infer')}
    rows = re.findall(
        r'^\| `(--[a-z-]+)[^`]*` \| ([a-z, ]+) \|', PAGES[0].read_text(), re.MULTILINE
    )
    assert len(rows) > 12
    for option, tools in rows:
        for tool in options if tools == 'all' else tools.split(', '):
            assert option in options[tool] or option == '--debug', f'{tool} has no {option}'


def message_templates():
    """The texts in the sources of pvt_mm, with a NUL for each value that is filled in."""
    for file in (REPO / 'pvt_mm').rglob('*.py'):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield ''.join(
                    part.value if isinstance(part, ast.Constant) else '\0' for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def our_messages():
    """The messages of ours that the page on troubleshooting quotes."""
    ours = False
    for line in (REPO / 'docs/troubleshooting.md').read_text().splitlines():
        if line.startswith('| message'):
            ours = line.startswith('| message of ours')
        elif line.startswith('| `') and (ours or '| pvt_mm |' in line):
            yield line.split('`')[1]


@pytest.mark.parametrize('message', list(our_messages()))
def test_messages_are_in_the_code(message):
    """A message of ours that the page quotes still exists."""
    pattern = '.*'.join(re.escape(part) for part in message.split('...'))
    assert any(re.search(pattern, text, re.DOTALL) for text in message_templates())


def test_shapes_on_the_page_are_those_of_the_model():
    """The table of PVT-Small's stages is what the model has."""
    page = (REPO / 'docs/how_pvt_works.md').read_text()
    with torch.device('meta'), torch.no_grad():
        model = pvt_mm.PVT('small').eval()
        features = model(torch.empty(1, 3, 800, 1344))
    for index, (stage, feature) in enumerate(zip(model.stages, features)):
        attention = stage.blocks[0].attn
        with torch.no_grad():
            keys = attention.reduce(feature.permute(0, 2, 3, 1))  # (B, H', W', C)
        (width, h, w), (kh, kw) = feature.shape[1:], keys.shape[1:3]
        row = (
            f'| {index + 1} | {h} x {w} = {h * w:,} | {width} | {attention.num_heads} '
            f'| {attention.sr_ratio} | {kh} x {kw} = {kh * kw:,} | {h * w * kh * kw / 1e6:.1f} |'
        )
        assert row in page


def test_architectures_on_the_page_are_those_of_the_table():
    """Blocks and widths of every architecture are those of pvt_mm.archs."""
    page = (REPO / 'docs/how_pvt_works.md').read_text()
    for version, archs in (('PVT', pvt_mm.PVT.ARCHS), ('PVTv2', pvt_mm.PVTv2.ARCHS)):
        for name, arch in archs.items():
            depths, dims = (', '.join(map(str, arch[key])) for key in ('depths', 'dims'))
            row = rf'^\| {version} [\w, ]*\b{name}\b[\w, ]* \| {depths} \| {dims} \|$'
            assert re.search(row, page, re.MULTILINE), name


def test_api_page_has_all_that_the_package_exports():
    """Every public name of pvt_mm stands on the page, and what stands there exists."""
    named = re.findall(r'^::: (\S+)$', (REPO / 'docs/api.md').read_text(), re.MULTILINE)
    exported = {f'pvt_mm.{name}' for name in pvt_mm.__all__ if name != '__version__'}
    assert exported <= set(named)
    assert all(exists(name) for name in named)


# The site


def anchors(page):
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    heads = re.findall(r'^#+ (.+)$', page.read_text(), re.MULTILINE)
    return {re.sub(r'[^\w -]', '', head.lower()).strip().replace(' ', '-') for head in heads}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Links to files, in the README also outside docs, and to headings lead to what is there."""
    text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r'\]\(([^)\s]+)\)', text):
        place, _, anchor = link.partition('#')
        if '://' in place:
            continue
        target = page.parent / place if place else page
        assert target.exists(), f'{link} leads nowhere'
        if anchor:
            assert anchor in anchors(target), f'{link}: there is no such heading'


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """The site, built under --strict."""
    pytest.importorskip('material')
    pytest.importorskip('mkdocstrings')
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp('site')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPO)
        cfg = load_config(str(REPO / 'mkdocs.yml'), site_dir=str(folder), strict=True)
        cfg.plugins.on_startup(command='build', dirty=False)
        build(cfg)
    return folder


def test_site_loads_nothing_from_elsewhere(site):
    """Every page is in the site, and none names a script, style or picture of another place."""
    built = {file.stem for file in site.glob('*.html')}
    assert {page.stem for page in PAGES[1:]} <= built
    for page in site.glob('*.html'):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]+src="?([^">\s]+)', page.read_text())
        loaded += re.findall(r'<link[^>]+rel="?stylesheet[^>]+href="?([^">\s]+)', page.read_text())
        assert loaded and not [place for place in loaded if re.match(r'(https?:)?//', place)]


@pytest.mark.skipif(shutil.which('chromium') is None, reason='there is no Chromium')
def test_site_works_in_a_browser_without_the_network(site):
    """Pages opened as files ask for nothing elsewhere, log no error, and can be searched."""
    sync_api = pytest.importorskip('playwright.sync_api')
    complaints, asked = [], []
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(
            executable_path=shutil.which('chromium'), args=['--no-sandbox']
        )
        page = chromium.new_page(viewport={'width': 1280, 'height': 900})
        page.on('console', lambda message: complaints.append(message.text))
        page.on('pageerror', lambda error: complaints.append(str(error)))
        page.on('request', lambda request: asked.append(request.url))
        for name in ('index', 'how_pvt_works', 'troubleshooting', 'api'):
            page.goto(f'file://{site}/{name}.html')
            assert page.evaluate('document.documentElement.scrollWidth') <= 1280, (
                'nothing sticks out'
            )
        page.locator('.md-search__input').press_sequentially('bfloat16')  # it listens to keys
        page.wait_for_selector('.md-search-result__item', timeout=60_000)
        chromium.close()
    assert not complaints
    assert not [url for url in asked if not url.startswith(('file:', 'data:'))]
