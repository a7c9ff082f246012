"""The backbones of a model are found wherever they are, by the names that its weights have."""

from mmengine.model import BaseTTAModel
from mmengine.registry import MODEL_WRAPPERS
from reference import small
from torch import nn

from pvt_mm.engine.model_parts import find_backbones, find_modules, unwrap_model


@MODEL_WRAPPERS.register_module()
class Wrapper(nn.Module):
    """Stands in for DistributedDataParallel."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def test_step(self, data):
        """Be what test-time augmentation wraps."""


class Augmented(BaseTTAModel):
    """Test-time augmentation, which merges nothing here."""

    def merge_preds(self, data_samples_list):
        return data_samples_list


def test_backbones_are_found_by_their_names():
    """Both versions, in a part of the model too; a bare backbone has no name."""
    backbone, student = small('v1'), nn.ModuleDict({'backbone': small('v2')})
    model = nn.ModuleDict({'backbone': backbone, 'student': student, 'head': nn.Linear(2, 2)})
    assert find_backbones(model) == {
        'backbone': backbone, 'student.backbone': student['backbone'],
    }  # fmt: skip
    assert find_backbones(backbone) == {'': backbone}
    assert find_backbones(nn.Linear(2, 2)) == {}
    assert list(find_modules(model, nn.ModuleDict)) == ['', 'student']


def test_wrappers_are_no_part_of_a_name():
    """As in the state dict that mmengine loads, whatever wraps the model, and how often."""
    model = nn.ModuleDict({'backbone': small('v1')})
    for wrapped in (Wrapper(model), Augmented(Wrapper(model)), Wrapper(Wrapper(model))):
        assert unwrap_model(wrapped) is model
        assert find_backbones(wrapped) == {'backbone': model['backbone']}
