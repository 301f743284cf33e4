"""Names of a host that are bound to functions of ours and back, on a package that is written for the purpose."""

import importlib
import sys
import textwrap

import fresh
import pytest

from sparse_training.errors import UserError
from sparse_training.integrations.rebinding import Rebinding

FILES = {
    "__init__.py": '__version__ = "1.4.2"\n',
    "utils.py": """
        def score(x):
            return ("theirs", x)

        class Sampler:
            @staticmethod
            def sample(x):
                return ("theirs", x)
    """,
    "trainer.py": """
        from .utils import Sampler, score as _score

        def train(x):
            return _score(x), Sampler.sample(x)
    """,
    "late.py": "from .utils import score\n",
}
VERSIONS = ("1.4", "1.5")


def score(x):
    return ("ours", x)


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A package of the name that is returned, for this test alone."""
    name = "rebound_host"
    folder = tmp_path / name
    folder.mkdir()
    for file, text in FILES.items():
        (folder / file).write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


def rebinding(host, names=("utils:score",), versions=VERSIONS):
    """A method's replacement is bound as it stands in its class."""
    ours = {"utils:score": score, "utils:Sampler.sample": staticmethod(lambda x: ("ours", x))}
    return Rebinding(host, versions, {f"{host}.{name}": ours.get(name, score) for name in names})


def imported(host, name):
    return importlib.import_module(f"{host}.{name}")


def test_nothing_is_imported_before_it_is_turned_on(host):
    head = rebinding(host)
    assert host not in sys.modules
    assert not head.is_on
    head.on()
    assert head.is_on
    assert imported(host, "utils").score(1) == ("ours", 1)


def test_every_module_that_took_the_name_is_served_and_restored(host):
    trainer, utils = imported(host, "trainer"), imported(host, "utils")
    theirs, method = utils.score, vars(utils.Sampler)["sample"]
    head = rebinding(host, ("utils:score", "utils:Sampler.sample"))
    head.on()
    assert trainer.train(1) == (("ours", 1), ("ours", 1))
    late = imported(host, "late")
    assert late.score is score
    head.off()
    assert trainer.train(1) == (("theirs", 1), ("theirs", 1))
    assert utils.score is trainer._score is late.score is theirs
    assert vars(utils.Sampler)["sample"] is method


def test_names_of_other_packages_stay(host):
    here = sys.modules[__name__]
    here.kept = imported(host, "utils").score
    with rebinding(host):
        assert here.kept(1) == ("theirs", 1)
    del here.kept


def test_calls_may_be_repeated_and_blocks_nested(host):
    utils, head = imported(host, "utils"), rebinding(host)
    theirs = utils.score
    head.off()
    head.on()
    head.on()
    with head, head:
        assert utils.score is score
    assert utils.score is score  # it was on before the block
    head.off()
    assert utils.score is theirs
    with head:
        with head:
            pass
        assert utils.score is score
    assert utils.score is theirs
    with pytest.raises(ZeroDivisionError), head:
        raise ZeroDivisionError
    assert utils.score is theirs


@pytest.mark.parametrize("versions", [("1.5", "1.6"), ("1.2", "1.4.2"), ("1.10", "2")])
def test_a_version_that_does_not_fit_is_refused_by_those_that_do(host, versions):
    utils = imported(host, "utils")
    theirs = utils.score
    with pytest.raises(UserError, match=rf"{host} from {versions[0]} up to, but not including, {versions[1]}, got 1"):
        rebinding(host, versions=versions).on()
    assert utils.score is theirs


@pytest.mark.parametrize("version", ["1.4", "1.4.0", "1.4.0.dev3", "1.4.9.post1", "1.4.1+local"])
def test_versions_are_compared_as_numbers(host, version):
    importlib.import_module(host).__version__ = version
    with rebinding(host, versions=("1.4", "1.10")) as head:
        assert head.is_on


def test_a_missing_host_is_refused():
    with pytest.raises(UserError, match=r"needs no_such_host from 1\.4 up to.*cannot be imported"):
        rebinding("no_such_host").on()


@pytest.mark.parametrize("name", ["utils:gone", "gone:score", "utils:Gone.sample", "utils:Sampler.gone"])
def test_a_name_that_is_missing_is_refused_before_anything_is_changed(host, name):
    utils = imported(host, "utils")
    theirs = utils.score
    head = rebinding(host, ("utils:score", name))
    with pytest.raises(UserError, match=rf"{host} 1\.4\.2 must have {host}\.{name} to be rebound"):
        head.on()
    assert utils.score is theirs
    assert not head.is_on


def test_what_another_bound_since_is_not_overwritten(host):
    utils, head = imported(host, "utils"), rebinding(host)
    theirs = utils.score
    head.on()
    utils.score = another = lambda x: score(x)
    with pytest.raises(UserError, match=rf"{host}\.utils\.score must be what .* made it, got <function"):
        head.off()
    assert utils.score is another
    assert head.is_on
    utils.score = score
    head.off()
    assert utils.score is theirs


def test_the_integrations_import_no_host():
    code = """
        import pkgutil, sys, importlib
        import sparse_training.integrations as room
        for module in pkgutil.iter_modules(room.__path__):
            importlib.import_module(f"{room.__name__}.{module.name}")
        hosts = {"trl", "transformers", "lightning", "verl", "openrlhf", "torchtitan", "mmseg", "swift", "axolotl"}
        print(sorted(hosts & set(sys.modules)))
    """
    run = fresh.run("-c", textwrap.dedent(code))
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
