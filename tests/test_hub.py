"""Published checkpoints of the Hugging Face hub: from its cache, without a connection, and names that lead nowhere."""

import hashlib
import time
import types

import pytest
from small_checkpoints import NAME, assert_same_bits, draw, timm_folder

import se_flax
from se_flax import Preprocess, UserError, load_pretrained
from se_flax.checkpoints import resolve


@pytest.fixture(scope="module")
def variables():
    return draw()


@pytest.fixture
def hub(variables, tmp_path, monkeypatch):
    """A cache of the hub with one repository, and no connection."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    published = resolve.published("seresnet50.ra2_in1k")[1]
    monkeypatch.setattr(resolve, "published", lambda ref: (NAME, published))
    commit, folder = "0123456789" * 4, tmp_path / "cache" / "models--timm--seresnet50.ra2_in1k"
    files, snapshot = timm_folder(tmp_path / "files", variables), folder / "snapshots" / commit
    for part in (folder / "blobs", folder / "refs", snapshot):
        part.mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    for name, digest in (("config.json", hashlib.sha1), ("model.safetensors", hashlib.sha256)):
        content = (files / name).read_bytes()
        blob = folder / "blobs" / digest(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(blob)
    return tmp_path / "cache", commit


def test_a_published_checkpoint_from_the_cache(hub, variables):
    cache, commit = hub
    loaded = load_pretrained("seresnet20.some_tag", cache_dir=cache)
    assert_same_bits(loaded.variables, variables)
    assert loaded.preprocess.image_size == 40
    assert loaded.provenance["source"] == "https://huggingface.co/timm/seresnet50.ra2_in1k"
    assert loaded.provenance["revision"] == commit and loaded.provenance["licence"] == "apache-2.0"
    for ref in ("timm/seresnet50.ra2_in1k", "hf-hub:timm/seresnet50.ra2_in1k"):
        assert_same_bits(load_pretrained(ref, cache_dir=cache, revision=commit).variables, variables)


def test_a_damaged_cache_is_noticed(hub):
    cache, _ = hub
    blob = next(p for p in cache.rglob("blobs/*") if len(p.name) == 64)
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=r"is damaged: its SHA-256 is .* and the hub recorded .*; delete "):
        load_pretrained("timm/seresnet50.ra2_in1k", cache_dir=cache)


def test_what_is_not_in_the_cache(hub):
    cache, _ = hub
    with pytest.raises(UserError, match=r"at revision 'v2' is not in the cache and the hub cannot be reached"):
        load_pretrained("timm/seresnet50.ra2_in1k", cache_dir=cache, revision="v2")
    with pytest.raises(UserError, match="timm/other is not in the cache and the hub cannot be reached; connect once"):
        load_pretrained("timm/other", cache_dir=cache)
    with pytest.raises(UserError, match="runs/mine: no such file or folder; as a repository, runs/mine is not in the"):
        load_pretrained("runs/mine", cache_dir=cache)


def test_without_a_connection_two_requests_decide(hub, variables, monkeypatch):
    import huggingface_hub

    asked = []

    def head(url, timeout):
        asked.append(url)
        raise ConnectionError("Name or service not known")

    cache, commit = hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: types.SimpleNamespace(head=head))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    text = r"timm/other is not in the cache and the hub cannot be reached; .* \(Name or service not known\)$"
    with pytest.raises(UserError, match=text):
        load_pretrained("timm/other", cache_dir=cache)
    assert asked == [huggingface_hub.constants.ENDPOINT] * 2
    # What is in the cache needs no connection, and a commit not even a request.
    assert_same_bits(load_pretrained("timm/seresnet50.ra2_in1k", cache_dir=cache).variables, variables)
    assert len(asked) == 4
    load_pretrained("timm/seresnet50.ra2_in1k", cache_dir=cache, revision=commit)
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("seresnet50.ra3_in1k", r"unknown checkpoint 'seresnet50.ra3_in1k'; choose one of .*seresnet50\.ra2_in1k"),
        ("seresnet50", r"seresnet50 has several checkpoints; choose one of seresnet50\.a1_in1k, "),
        ("seresnet51.ra2_in1k", r"unknown checkpoint 'seresnet51.ra2_in1k'; closest: seresnet50.ra2_in1k"),
        ("seresnet110", "no checkpoint of seresnet110 is published; train one"),
        ("./nothing/here", "nothing/here: no such file or folder"),
        ("model.safetensors", "model.safetensors: no such file or folder"),
        ("/etc/passwd/x", "no such file or folder"),
    ],
)
def test_names_that_lead_nowhere(ref, message):
    with pytest.raises(UserError, match=message):
        load_pretrained(ref)


def test_every_published_checkpoint_of_our_networks_is_found():
    found = 0
    for name in se_flax.list_models():
        for weights in se_flax.get_variant(name).weights:
            assert resolve.published(f"{name}.{weights.tag}") == (name, weights)
            assert Preprocess.of(weights).image_size == weights.image_size
            found += 1
    assert found >= 176
