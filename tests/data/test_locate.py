from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qpipe.data.locate import locate
from qpipe.errors import ConfigError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution `some-data` with import package `some_data`, which must not be imported."""
    site = tmp_path / "site"
    (site / "some_data" / "model").mkdir(parents=True)
    (site / "some_data" / "__init__.py").write_text("raise RuntimeError('imported')")
    (site / "some_data" / "model" / "config.json").write_text("{}")
    info = site / "some_data-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n")
    (info / "RECORD").write_text("some_data/__init__.py,,\nsome_data/model/config.json,,\n")
    monkeypatch.syspath_prepend(str(site))
    return site


@pytest.mark.parametrize(
    "name",
    ["some-data/some_data/model", "some_data/some_data/model", "some_data/model", "some-data/model"],
)
def test_package_path_without_import(package: Path, name: str) -> None:
    assert locate(f"package:{name}") == str((package / "some_data" / "model").resolve())
    assert "some_data" not in sys.modules


def test_import_package_without_distribution(package: Path) -> None:
    (package / "some_data-1.0.dist-info" / "METADATA").unlink()
    for file in (package / "some_data-1.0.dist-info").iterdir():
        file.unlink()
    (package / "some_data-1.0.dist-info").rmdir()
    assert locate("package:some_data/model/config.json").endswith("some_data/model/config.json")
    with pytest.raises(ConfigError, match="near ones: some_data/model"):
        locate("package:some_data/modell")


def test_not_installed() -> None:
    with pytest.raises(ConfigError, match="pip install no-such-package"):
        locate("package:no-such-package/model")


def test_missing_path_lists_near_ones(package: Path) -> None:
    with pytest.raises(ConfigError, match=r"no 'some_data/modle'; near ones: .*some_data/model"):
        locate("package:some-data/some_data/modle")


@pytest.mark.parametrize(
    "name", ["package:some-data", "package:/x", "package:some-data/../x", "package:some-data//etc"]
)
def test_malformed(package: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="package:NAME/PATH"):
        locate(name)


def test_local_and_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(str(tmp_path)) == str(tmp_path)
    assert locate("google/bert-tiny") == "google/bert-tiny"
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert locate("~/m") == str(tmp_path / "m")
