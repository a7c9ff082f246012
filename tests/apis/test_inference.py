"""Predictor takes a config as a training has dumped it, or as mmengine's Runner reads it."""

from pvt_mm.apis.inference import Predictor
from pvt_mm.config import load_config


def test_the_config_may_be_of_a_distributed_training_with_its_preprocessor_beside(
    trained, demo_data
):
    """Inference is one process, and normalises images as the training did."""
    first = trained('det')
    image = sorted((demo_data / 'coco/val2017').iterdir())[0]
    plain, dumped = (load_config(str(first.config)) for _ in range(2))
    dumped.launcher = 'pytorch'
    dumped.data_preprocessor = dumped.model.pop('data_preprocessor')
    expected, result = (
        Predictor(cfg, str(first.checkpoint), 'cpu')(image).pred_instances
        for cfg in (plain, dumped)
    )
    assert len(expected) > 0 and result.scores.tolist() == expected.scores.tolist()
