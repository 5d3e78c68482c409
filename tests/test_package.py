"""The metadata of the package, and the files that maintainers use to release it."""

import re
import runpy
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import setuptools
import yaml

import modeling_sparse_moe_vlm

pytestmark = pytest.mark.newest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")


def load_release_check():
    spec = spec_from_file_location("check_release", ROOT / ".ci/check_release.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_citation_names_the_version_and_the_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == modeling_sparse_moe_vlm.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == PROJECT["urls"]["Source"]
    assert citation["url"] == PROJECT["urls"]["Documentation"]


def test_urls_are_those_of_one_repository():
    source = PROJECT["urls"]["Source"]
    for name in ("Homepage", "Issues", "Changelog"):
        assert PROJECT["urls"][name].startswith(source)
    assert source in (ROOT / "SECURITY.md").read_text()
    assert source in (ROOT / ".github/ISSUE_TEMPLATE/config.yml").read_text()


def test_dev_has_every_extra_that_the_tests_need():
    extras = PROJECT["optional-dependencies"]
    (own,) = (name for name in extras["dev"] if name.startswith("sparse-moe-vlm["))
    names = set(re.search(r"\[(.+)\]", own)[1].split(","))
    assert names <= set(extras)
    assert names >= {"docs", "report", "trl"}


def test_classifiers_name_the_python_versions_that_are_tested():
    versions = {name.rsplit(" ", 1)[1] for name in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", name)}
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert {job["python"] for job in jobs["test"]["strategy"]["matrix"]["include"]} == versions
    assert f">={min(versions, key=lambda version: int(version[2:]))}" == PROJECT["requires-python"]


def test_both_ends_of_the_transformers_range_are_tested():
    (requirement,) = (name for name in PROJECT["dependencies"] if name.startswith("transformers"))
    oldest = re.search(r"^transformers==(\d+\.\d+)\.\d+$", (ROOT / ".ci/oldest.txt").read_text(), re.M)[1]
    assert requirement == f"transformers>={oldest},<6"
    include = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    jobs = {job["name"]: job for job in include["include"]}
    assert ".ci/oldest.txt" in jobs["oldest Transformers"]["constraints"]
    assert ".ci/oldest.txt" not in jobs["newest Transformers"]["constraints"]
    assert [name for name, job in jobs.items() if job.get("allowed-failure")] == ["pre-release of Transformers"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_use_commands_and_files_of_the_repository(workflow):
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    commands = "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"make ([a-z]+)", commands)) <= targets
    for path in re.findall(r"\.ci/[\w.]+", workflow.read_text()):
        assert (ROOT / path).exists() or "*" in path, path


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_issue_forms_have_required_fields(form):
    content = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= set(content)
    assert any(part.get("validations", {}).get("required") for part in content["body"])


def test_a_release_needs_one_version_everywhere(tmp_path, monkeypatch):
    release = load_release_check()
    monkeypatch.setattr(release, "ROOT", tmp_path)
    (tmp_path / "modeling_sparse_moe_vlm").mkdir()
    (tmp_path / "modeling_sparse_moe_vlm/__init__.py").write_text('"""A."""\n\n__version__ = "1.2.0"\n')
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.2.0\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [1.2.0] – 2027-01-31\n")
    assert release.mistakes_of("v1.2.0") == []

    (mistake,) = release.mistakes_of("v1.2.1")
    assert "v1.2.1" in mistake
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.1.0\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [1.2.0] – unreleased\n")
    first, second = release.mistakes_of("v1.2.0")
    assert "CITATION.cff" in first
    assert "CHANGELOG.md" in second


def test_package_indexes_get_absolute_links(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project.urls]\nSource = "https://github.com/a/b"\n')
    (tmp_path / "README.md").write_text("[one](docs/a.md) ![two](b.svg) [three](https://c.d/e) [four](#five)\n")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    assert runpy.run_path(str(ROOT / "setup.py"))["readme_for_package_indexes"]() == (
        "[one](https://github.com/a/b/blob/main/docs/a.md) ![two](https://raw.githubusercontent.com/a/b/main/b.svg) "
        "[three](https://c.d/e) [four](#five)\n"
    )


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
