"""Export a trained model to ONNX or a PyTorch program, and compare the numbers."""

from __future__ import annotations

import copy
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pvt_mm.apis.inference import Predictor
from pvt_mm.errors import UserError

#: Endings of the files that can be written.
SUFFIXES = ('.onnx', '.pt2')

#: The newest that torch.onnx writes without converting; onnxruntime takes it from 1.17 on.
OPSET = 20

#: Largest difference from PyTorch that passes, over the std of an output.
TOLERANCE = 1e-4

#: What passes in addition, over an output's root mean square: 32 roundings of fp32. A class score
#: that is nearly the same everywhere has a std not far above these.
ROUNDING = 2.0**-18

#: Batch, height and width that the numbers are checked at. The graph is recorded at another size;
#: 7 divides no side of the last one, nor of its feature maps.
CHECKED = ((1, 224, 224), (2, 160, 256), (2, 165, 237))
_RECORDED = (2, 3, 192, 320)

#: Operations that are computed in int8; softmax, norms and activations stay in fp32.
QUANTISED = ('Conv', 'MatMul', 'Gemm')

IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')

Run = Callable[[Tensor], Sequence[Tensor]]


class Difference(NamedTuple):
    """The difference of an output from PyTorch's, over the std of PyTorch's."""

    size: tuple[int, ...]
    output: str
    largest: float
    rms: float
    allowed: float


# What is exported


class Part(nn.Module):
    """The exported part of a model: from normalised images to named tensors.

    Shape:
        image: (B, 3, H, W) -> tensors, each in the order of :meth:`named`.
    """

    #: Tells the user what the outputs are, and what is left out.
    about = ''
    #: Children of the model that the outputs need; the others are not in the file.
    uses: tuple[str, ...] = ()

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def named(self, image: Tensor) -> dict[str, Tensor]:
        """Compute the outputs by name."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs in order."""
        return tuple(self.named(image).values())


class Backbone(Part):
    """The features of a backbone."""

    about = 'the backbone: one feature map per stage, at strides 4, 8, 16 and 32'
    uses = ('backbone',)

    def named(self, image: Tensor) -> dict[str, Tensor]:
        """Compute ``stage1`` to ``stage4``, those that the config asks for."""
        features = self.model.backbone(image)
        indices = self.model.backbone.out_indices
        return {f'stage{i + 1}': feature for i, feature in zip(indices, features)}


class Segmentor(Part):
    """A whole segmentor."""

    about = (
        "the whole segmentor: logits resized to the input's height and width; their argmax over "
        'the channels is the label map'
    )
    uses = ('backbone', 'neck', 'decode_head')

    def named(self, image: Tensor) -> dict[str, Tensor]:
        """Compute ``logits``, as mmseg does for a whole image."""
        logits = self.model.decode_head(self.model.extract_feat(image))
        size, corners = image.shape[2:], self.model.align_corners
        return {'logits': F.interpolate(logits, size, mode='bilinear', align_corners=corners)}


class SingleStage(Part):
    """A detector of one stage, up to the raw outputs of its head."""

    about = (
        "the detector up to its head's raw outputs, level by level; decoding boxes and NMS are not "
        'in it, since their result has no size known beforehand'
    )
    uses = ('backbone', 'neck', 'bbox_head')

    def named(self, image: Tensor) -> dict[str, Tensor]:
        """Compute ``cls_score0``, ..., ``bbox_pred0``, ... and a third kind (ATSS), ``other0``."""
        return _by_level('', self.model.bbox_head(self.model.extract_feat(image)))


class TwoStage(Part):
    """A detector of two stages, up to the raw outputs of its RPN."""

    about = (
        "backbone, neck and the RPN's raw outputs; proposals (NMS) and RoI heads are not in it, "
        "since mmcv's RoIAlign has no ONNX or torch.export form"
    )
    uses = ('backbone', 'neck', 'rpn_head')

    def named(self, image: Tensor) -> dict[str, Tensor]:
        """Compute ``feature0``, ..., ``rpn_cls_score0``, ..., ``rpn_bbox_pred0``, ..."""
        features = self.model.extract_feat(image)
        pyramid = {f'feature{i}': feature for i, feature in enumerate(features)}
        return pyramid | _by_level('rpn_', self.model.rpn_head(features))


def _by_level(prefix: str, outputs: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    kinds = ('cls_score', 'bbox_pred', 'other')[: len(outputs)]
    return {
        f'{prefix}{kind}{i}': output
        for kind, levels in zip(kinds, outputs, strict=True)
        for i, output in enumerate(levels)
    }


def part_of(model: Any, what: str) -> Part:
    """Return the part of a model that is exported, in evaluation mode and fp32.

    Args:
        model: A detector or segmentor.
        what: ``'backbone'`` or ``'model'``.

    Raises:
        UserError: Where no part of the model can be exported.
    """
    if hasattr(model.backbone, 'compute_dtype'):
        model.backbone.compute_dtype = None
    if what == 'backbone':
        if not hasattr(model.backbone, 'out_indices'):
            raise UserError(f'{type(model.backbone).__name__} is no backbone of pyramid features.')
        return Backbone(model).eval()
    kind = _kind(model)
    if kind is None:
        raise UserError(
            f'{type(model).__name__} with these heads does not export; --what backbone does.'
        )
    return kind(model).eval()


def _kind(model: Any) -> type[Part] | None:
    if hasattr(model, 'decode_head'):
        return None if isinstance(model.decode_head, nn.ModuleList) else Segmentor
    from mmdet.models.dense_heads.anchor_head import AnchorHead

    if isinstance(getattr(model, 'bbox_head', None), AnchorHead):
        return SingleStage
    return TwoStage if isinstance(getattr(model, 'rpn_head', None), AnchorHead) else None


# Files


def require(file_format: str) -> None:
    """Check that the packages of a format are installed.

    Raises:
        UserError: Where one is not.
    """
    _free_size()
    packages = ('onnx', 'onnxruntime', 'onnxscript') if file_format == 'onnx' else ()
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UserError(f"ONNX needs {', '.join(missing)}: pip install 'pvt-mm[export]'.")


def _free_size() -> Any:
    if hasattr(torch.compiler, 'is_exporting'):
        return torch.export.Dim.DYNAMIC
    raise UserError(f'Export needs PyTorch 2.7 or newer; this is {torch.__version__}.')


@torch.no_grad()
def export(part: Part, file_format: str) -> bytes:
    """Return the content of a file: the program of a part, for any batch, height and width.

    Raises:
        UserError: Where PyTorch cannot export it.
    """
    image = torch.zeros(_RECORDED)
    shapes = (dict.fromkeys((0, 2, 3), _free_size()),)
    file = io.BytesIO()
    with _quiet():
        try:
            program = torch.export.export(_exportable(part), (image,), dynamic_shapes=shapes)
        except Exception as error:  # PyTorch raises many kinds
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f'{type(part.model).__name__} does not export ({reason}); --what backbone does.'
            ) from error
        if file_format == 'pt2':
            torch.export.save(program, file)
            return file.getvalue()
        onnx: Any = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=['image'],
            output_names=list(part.named(image)),
            verbose=False,
        )
    _name_sizes(onnx.model)
    return onnx.model_proto.SerializeToString()


def _exportable(part: Part) -> Part:
    """Return a copy of the part: without unused children, and without mmseg's ``Upsample``.

    That class turns sizes into fixed numbers; PyTorch's own does not.
    """
    part = copy.deepcopy(part)
    for name, _ in list(part.model.named_children()):
        if part.uses and name not in part.uses:
            delattr(part.model, name)
    child: Any
    for parent in list(part.modules()):
        for name, child in parent.named_children():
            kind = type(child)
            if kind.__name__ == 'Upsample' and kind.__module__.startswith('mmseg.'):
                size, factor = child.size, child.scale_factor
                same = nn.Upsample(size, factor, child.mode, child.align_corners)
                setattr(parent, name, same)
    return part


def _name_sizes(model: Any) -> None:
    """Name the free sizes of the image; those of the outputs are expressions of them."""
    for place, name in ((0, 'batch'), (2, 'height'), (3, 'width')):
        old = str(model.graph.inputs[0].shape[place])
        for value in (*model.graph.inputs, *model.graph.outputs):
            shape = [
                size if isinstance(size, int) else str(size).replace(old, name)
                for size in value.shape
            ]
            value.shape = type(value.shape)(shape)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warnings and logs of exporters."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def load(content: bytes, file_format: str) -> Run:
    """Return a function that runs a file's program on the CPU, with as many threads as PyTorch."""
    if file_format == 'pt2':
        return torch.export.load(io.BytesIO(content)).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(content, options, providers=['CPUExecutionProvider'])

    def run(image: Tensor) -> list[Tensor]:
        return [torch.from_numpy(array) for array in session.run(None, {'image': image.numpy()})]

    return run


# Numbers and speed


@torch.no_grad()
def compare(part: Part, run: Run, images: Iterable[Tensor]) -> list[Difference]:
    """Compare a program with the part that it was exported from, output by output."""
    differences = []
    for image in images:
        expected = part.named(image.clone())
        for (name, ours), theirs in zip(expected.items(), run(image), strict=True):
            error, scale = theirs - ours, ours.std().clamp(min=1e-12)
            largest = float(error.abs().max() / scale)
            rms = float(error.square().mean().sqrt() / scale)
            allowed = TOLERANCE + ROUNDING * float(ours.square().mean().sqrt() / scale)
            differences.append(Difference(tuple(image.shape), name, largest, rms, allowed))
    return differences


def random_images() -> Iterator[Tensor]:
    """Yield the batches that an export is checked with."""
    generator = torch.Generator().manual_seed(0)
    for batch, height, width in CHECKED:
        yield torch.randn(batch, 3, height, width, generator=generator)


def agrees(differences: Sequence[Difference]) -> bool:
    """Tell whether all differences are within the tolerance; NaN is not."""
    return all(difference.largest <= difference.allowed for difference in differences)


@torch.inference_mode()
def time_side_by_side(
    runs: dict[str, Run], size: tuple[int, int], rounds: int = 10
) -> dict[str, float]:
    """Return the median milliseconds for one image; the programs run in turns.

    In each turn a program runs twice, and only the second run counts: at first, the threads of the
    previous program still keep the cores busy while they wait.
    """
    image = torch.randn(1, 3, *size)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run(image)
            start = time.perf_counter()
            run(image)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


# Int8


def find_images(places: Sequence[str]) -> list[Path]:
    """Return image files, those of folders included.

    Raises:
        UserError: Where there is none.
    """
    files: list[Path] = []
    for place in map(Path, places):
        inside = sorted(place.iterdir()) if place.is_dir() else [place]
        images = [file for file in inside if file.suffix.lower() in IMAGES and file.is_file()]
        if not images:
            raise UserError(f'{place} is no image and no folder of images; calibration needs one.')
        files += images
    return files


def preprocessed(predictor: Predictor, files: Iterable[Path]) -> list[Tensor]:
    """Return images as the model gets them from the config's test pipeline and preprocessor.

    Raises:
        UserError: Where one cannot be read.
    """
    model = predictor.model
    return [model.data_preprocessor(predictor.load(file), False)['inputs'] for file in files]


class _Reader:
    """Give images to onnxruntime's calibration."""

    def __init__(self, images: Iterable[Tensor]) -> None:
        self.images = iter(images)

    def get_next(self) -> dict[str, Any] | None:
        image = next(self.images, None)
        return None if image is None else {'image': image.numpy()}


def quantise(content: bytes, images: Sequence[Tensor]) -> bytes:
    """Return an ONNX program with int8 matmuls and convolutions, calibrated on preprocessed images.

    Weights have one scale per channel, activations one scale, from their range over the images.
    """
    from onnxruntime import quantization

    with tempfile.TemporaryDirectory() as folder, _quiet():
        plain, prepared, int8 = (Path(folder, f'{name}.onnx') for name in ('plain', 'pre', 'int8'))
        plain.write_bytes(content)
        # Sizes are free: symbolic shape inference would fail.
        quantization.quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(int8),
            _Reader(images),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTISED),
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            activation_type=quantization.QuantType.QUInt8,
        )
        return int8.read_bytes()
