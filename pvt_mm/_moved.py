"""Module names of 0.1.0, by which whole-model pickles name their classes; gone in 0.3.0."""

import sys
from importlib import import_module

MOVED = {
    'classification': 'models.classification',
    'layers': 'models.layers',
    'pvt': 'models.pvt',
    'pvt_v2': 'models.pvt',
    'pyramid': 'models.pyramid',
    'runtime': 'engine.runtime',
}
for old, new in MOVED.items():
    module = import_module(f'pvt_mm.{new}')
    sys.modules[f'pvt_mm.{old}'] = module
    setattr(sys.modules['pvt_mm'], old, module)
