"""Build the pvt-mm distribution; the settings of the development tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# What single features need. A torchvision is built for one PyTorch, so pip may bring that too.
EXTRAS = {
    'classification': ['mmpretrain==1.2.0', 'torchvision'],
    'fast-eval': ['faster-coco-eval>=1.8'],
    'export': ['onnx>=1.17', 'onnxruntime>=1.17', 'onnxscript>=0.5'],
}
# Where OpenMMLab's tools look inside the package, and what they find there.
MIM_LINKS = {
    'configs/pvt': '../../../configs',
    'tools': '../../tools',
    'model-index.yml': '../../model-index.yml',
}


def read_version() -> str:
    """Return the version, without importing the package and with it PyTorch."""
    text = (ROOT / 'pvt_mm' / 'version.py').read_text(encoding='utf-8')
    return re.findall(r"^__version__ = '(.+)'$", text, re.MULTILINE)[0]


def read_pins(stack: str) -> list[str]:
    """Return the pinned requirements of one stack, comments left out."""
    lines = (ROOT / 'requirements' / f'{stack}.txt').read_text(encoding='utf-8').splitlines()
    return [line for line in lines if line and not line.startswith('#')]


def read_description() -> str:
    """Return README.md, where there is one."""
    readme = ROOT / 'README.md'
    return readme.read_text(encoding='utf-8') if readme.exists() else ''


def link_mim() -> None:
    """Make the links of pvt_mm/.mim here, since archives and some checkouts lose links."""
    for name, target in MIM_LINKS.items():
        link = ROOT / 'pvt_mm' / '.mim' / name
        if not link.is_symlink():
            link.unlink(missing_ok=True)  # a text file, where a link was lost
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target)


link_mim()
setup(
    name='pvt-mm',
    version=read_version(),
    description='Pyramid Vision Transformers (PVT, PVT v2) as OpenMMLab backbones',
    long_description=read_description(),
    long_description_content_type='text/markdown',
    author='The pvt_mm authors',
    license='Apache-2.0',
    license_files=['LICENSE'],
    classifiers=[
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Image Recognition',
    ],
    python_requires='>=3.10',
    install_requires=['torch>=2.1', 'numpy'],
    # Both stacks provide the same modules, so neither can be a hard requirement.
    extras_require={stack: read_pins(stack) for stack in ('openmmlab', 'onedl')} | EXTRAS,
    packages=find_packages(include=['pvt_mm', 'pvt_mm.*']),
    # setuptools follows the links, so that a wheel holds the files themselves: of the tools those
    # for users; benchmarks and demo stay in the repository.
    include_package_data=False,
    package_data={
        'pvt_mm': [
            'visualization/*.html',
            '.mim/*.yml',
            '.mim/configs/**/*.py',
            '.mim/configs/**/*.yml',
            '.mim/tools/*.py',
            '.mim/tools/*.sh',
            '.mim/tools/analysis_tools/*.py',
            '.mim/tools/deployment/*.py',
            '.mim/tools/model_converters/*.py',
        ]
    },
    exclude_package_data={'pvt_mm': ['.mim/tools/install.sh', '.mim/tools/build_mmcv.py']},
    zip_safe=False,
)
