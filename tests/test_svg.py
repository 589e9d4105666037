"""Scenes as SVG."""

from xml.etree import ElementTree

from alignments import alignments, layers_of
from hypothesis import given

from fxfuse.scene import lay_out
from fxfuse.svg import clean, render

NAMESPACE = {"s": "http://www.w3.org/2000/svg"}


@given(alignments())
def test_it_is_xml_and_shows_every_layer_by_its_full_name(alignment):
    root = ElementTree.fromstring(render(lay_out(alignment), "an <alignment> & more"))
    assert root.get("aria-label") == "an <alignment> & more"
    groups = root.findall("s:g[@class='fx-layer']", NAMESPACE)
    titles = [g.find("s:title", NAMESPACE).text.split("\n")[0] for g in groups]
    assert sorted(titles) == sorted(clean(name) for _, name in layers_of(alignment))


@given(alignments())
def test_it_names_nothing_to_fetch(alignment):
    text = render(lay_out(alignment), "x")
    assert "href" not in text and "<image" not in text and "@import" not in text


def test_characters_that_xml_forbids_are_replaced():
    assert clean("a\x00b\x1f\ud800\n") == "a\ufffdb\ufffd\ufffd\n"
