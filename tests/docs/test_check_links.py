"""Links of a built site."""

from check_links import broken


def test_links_to_pages_and_places_that_are_not_there_are_found(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "sub" / "b.html").write_text('<a href="../a.html#here"></a><a href="#x">')
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="sub/b.html"><a href="#here"><img src="a.png"><a href="sub/c.html">'
        '<a href="https://elsewhere.org/x"><a href="sub/b.html#gone"><img src="b.png">'
    )
    assert broken(tmp_path) == [
        "a.html: sub/c.html",
        "a.html: sub/b.html#gone",
        "a.html: b.png",
        "sub/b.html: #x",
    ]
