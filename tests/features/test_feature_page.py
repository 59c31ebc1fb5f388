"""A page of features: where they fire, what they say directly, and nothing that a token could do to the page."""
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from bizzaroworld.dictionaries.harvest import activations, blocks, documents
from bizzaroworld.dictionaries.saes import DictionaryError, perfect
from bizzaroworld.features.feature_page import Example, FeatureRecord, direct_effects, feature_records, neuronpedia, top_blocks, write_feature_page
from bizzaroworld.model.load import load_model


@pytest.fixture(scope="module")
def nano(): return load_model("bizzaro-nano")


@pytest.fixture(scope="module")
def text(nano): return blocks(nano, documents("facts", 200), context=24)


def test_the_blocks_in_which_a_feature_is_largest(nano, text):
    sae = perfect(nano.d_model, "resid_post", 2)
    found, share = top_blocks(nano, sae, text.ids[:40], [5, 130], text.lead, most=3, at_once=7)
    values = sae.encode(activations(nano, text.ids[:40], [sae.reads], text.lead)[sae.reads])
    for j, f in enumerate((5, 130)):
        best = values[..., f].max(1)
        rows = best.values.argsort(descending=True)[:3].tolist()
        assert [(r, int(best.indices[r]) + text.lead) for r in rows] == [(r, p) for _, r, p in found[f]]
        assert share[j] == pytest.approx((values[..., f] > 0).float().mean().item())
        assert all(nano.tokenizer.bos_token_id != text.ids[r, p] for _, r, p in found[f])


@pytest.mark.parametrize("layer", [2, 7])
def test_what_a_feature_says_directly_is_its_share_of_the_last_stream(nano, text, layer):
    "Against the bare model: the share taken off what enters its last norm."
    sae, ids, last = perfect(nano.d_model, "resid_post", layer), text.ids[0, :12], nano.hf.model.norm
    there = activations(nano, ids[None], [("resid_post", layer)], 0)["resid_post", layer][0, -1]
    f = int(sae.encode(there).argmax())
    entering = []
    handle = last.register_forward_pre_hook(lambda m, args: entering.append(args[0].detach().clone()))
    with torch.no_grad(): nano.hf(ids[None])
    handle.remove()
    stream = entering[0][0, -1]
    without = stream - sae.encode(there)[f] * sae.W_dec[f]
    with torch.no_grad(): right = nano.hf.lm_head(last(stream)) - nano.hf.lm_head(last(without))
    torch.testing.assert_close(direct_effects(nano, sae, [ids], f), right, rtol=1e-3, atol=1e-3)
    assert right.abs().max() > 0.05


def test_a_feature_of_heads_says_nothing_directly(nano, text):
    sae = perfect(nano.n_heads * nano.d_head, "z", 3, nano.n_heads)
    with pytest.raises(DictionaryError, match="does not write into the residual stream"): direct_effects(nano, sae, [text.ids[0]], 0)
    (record,) = feature_records(nano, sae, text.ids[:10], [4], lead=text.lead)
    assert record.promotes == () and record.examples and max(record.examples[0].values) == record.examples[0].values[record.examples[0].peak]


def test_no_such_feature(nano, text):
    with pytest.raises(DictionaryError, match="no feature 256: they are 0 to 255"): feature_records(nano, perfect(nano.d_model), text.ids[:4], [3, 256], lead=text.lead)


class Reader(HTMLParser):
    "Tags, ids and links of a page."
    def __init__(self):
        super().__init__()
        self.tags, self.ids, self.links = [], [], []
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if "href" in attrs else []


def test_the_page_opens_alone_and_shows_markup_as_text(nano, tmp_path):
    bad = "</p><script>alert(1)</script>"
    record = FeatureRecord(7, 0.125, (Example((bad, " b"), (0.0, 2.0), 1),), ((bad, 1.5),), (), ((bad, -0.5),))
    page = write_feature_page(tmp_path / "p.html", perfect(4), [record, FeatureRecord(3, 0.0, ())], bad, "gemma-2-2b/12-gemmascope-res-16k").read_text("utf-8")
    reader = Reader()
    reader.feed(page)
    assert "script" not in reader.tags and "link" not in reader.tags and "img" not in reader.tags and reader.ids == ["f7", "f3"]
    assert [l for l in reader.links if not l.startswith("#")] == [f"https://www.neuronpedia.org/gemma-2-2b/12-gemmascope-res-16k/{f}" for f in (7, 3)]
    assert "12.50%" in page and "on at no token" in page.lower()
    assert not re.search(r"src=|@import|url\(", page) and np.all([c in page for c in ("&lt;script&gt;", "+1.50", "-0.50")])
    assert "neuronpedia" not in write_feature_page(tmp_path / "q.html", perfect(4), [record]).read_text("utf-8").lower()


@pytest.mark.parametrize("name", ["gemma", "a/b/c", "a b/c", "../x", 'a/"onload='])
def test_a_name_at_neuronpedia_has_two_parts(name):
    with pytest.raises(DictionaryError, match="MODEL/SOURCE"): neuronpedia(name, 1)
