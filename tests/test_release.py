"""The version, in all places that name it, and the checks that run before a commit."""

import datetime
import re

import yaml
from reference import REPO

import pvt_mm


def test_one_version():
    """The newest entry of the changelog and the citation are of this version, with its date."""
    number, date = re.search(
        r'^## ([\d.]+) \((.+)\)$', (REPO / 'CHANGELOG.md').read_text(), re.MULTILINE
    ).groups()
    citation = yaml.safe_load((REPO / 'CITATION.cff').read_text())
    assert pvt_mm.__version__ == number == citation['version']
    assert datetime.date.fromisoformat(date) == citation['date-released']


def test_releases_are_in_order():
    """Dates and versions fall from the top of the changelog down."""
    found = re.findall(r'^## (\S+) \((.+)\)$', (REPO / 'CHANGELOG.md').read_text(), re.MULTILINE)
    versions = [tuple(map(int, version.split('.'))) for version, _ in found]
    dates = [date for _, date in found]
    assert len(found) > 1 and versions == sorted(versions, reverse=True)
    assert dates == sorted(dates, reverse=True)


def test_hooks_run_what_make_lint_runs():
    """.pre-commit-config.yaml has every command of `make lint`, and no other."""
    recipe = re.search(r'^lint: .*\n((?:\t.*\n)+)', (REPO / 'Makefile').read_text(), re.MULTILINE)
    wanted = re.findall(r'\$\(BIN\)/(ruff \w+|[\w-]+)', recipe[1])
    hooks = yaml.safe_load((REPO / '.pre-commit-config.yaml').read_text())['repos'][0]['hooks']
    found = [re.search(r'\.venv/bin/(ruff \w+|[\w-]+)', hook['entry'])[1] for hook in hooks]
    assert found == wanted


def test_workflow_runs_ci():
    """The workflow runs .ci/run and holds no commands of its own."""
    workflow = yaml.safe_load((REPO / '.github/workflows/ci.yml').read_text())
    (job,) = workflow['jobs'].values()
    commands = [step['run'] for step in job['steps'] if 'run' in step]
    assert len(commands) == 1 and commands[0].endswith('bash .ci/run')
