"""`bapq report`: one page that needs nothing else, about a bank and about a trace."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from bapq_edge import errors


class Outline(HTMLParser):
    """Checks that tags are closed in order; keeps the headings and what refers elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.elsewhere, self.points = [], [], [], 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "path", "circle", "polyline"):
            self.open.append(tag)
        values = dict(attributes)
        self.elsewhere += [values[name] for name in ("src", "href") if name in values]
        self.points += values.get("points", "").count(",")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)


def test_the_page_of_a_bank_stands_alone(bapq, made, tmp_path):
    out, err = bapq("report", made / "two.bank", "-o", "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Outline(text)
    assert page.headings == ["Coverage", "Error against bytes", "Layers", "Boards"]
    assert page.elsewhere == [] and "<script" not in text and "url(" not in text
    assert page.points > 20 and err == "" and "open it" in out
    assert "NaN" not in text and "nan" not in re.findall(r">([^<]*)<", text)
    for name in ("32 x 64", "raspberry_pi_5", "prefers-color-scheme:dark", "@media print"):
        assert name in text


def test_the_boards_are_predicted_for_the_input_that_is_given(bapq, made, tmp_path):
    bapq("report", made / "one.bank", "-o", "report.html", "--profile", "raspberry_pi_5")
    text = (tmp_path / "report.html").read_text()
    Outline(text)
    for said in ("8 in memory, ms", "Energy of a run: an estimate", "rests on an assumption"):
        assert said in text
    boards = re.findall(r"<tr><td>([a-z]\w+_\w+)</td>", text)
    assert boards[0] == "raspberry_pi_5" and boards.count("raspberry_pi_5") == 3


def test_an_input_that_does_not_fit_is_refused(refused, made):
    arguments = ("report", made / "one.bank", "-o", "r.html")
    assert "no input 'other'" in refused(errors.RunInputError, *arguments, "--shape", "other=1,64")
    assert "no profile is named" in refused(errors.ProfileError, *arguments, "--profile", "toaster")


def test_where_zeros_are_no_input_the_page_says_what_to_give(bapq, tmp_path):
    from support.streaming import mobile_bank

    bank = mobile_bank(tmp_path / "m.bank", open_image=True)
    bapq("report", bank, "-o", "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "No times, memory and energy of the boards: input x is" in text and "--shape" in text
    bapq("report", bank, "-o", "report.html", "--shape", "x=1,48,7,6")
    assert "8 in memory, ms" in (tmp_path / "report.html").read_text()


def test_a_trace_is_drawn(bapq, made, tmp_path):
    bapq("profile", made / "one.bank", "-o", "trace.json", "--seconds", 0.3)
    bapq("report", made / "one.bank", "-o", "report.html", "--trace", "trace.json")
    page = Outline((tmp_path / "report.html").read_text())
    assert {"Memory", "Available memory", "Reads and waits"} <= set(page.headings)


def test_names_are_text_and_no_html():
    from bapq_tools.report.page import page, table

    text = page("<b>", [table(["<i>"], [["<script>"]])])
    assert "<b>" not in text and "<i>" not in text and "<script>" not in text


@pytest.mark.parametrize("content", ["{}", "[]", "no JSON"])
def test_what_is_no_trace_is_refused(refused, made, tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    arguments = ("report", made / "one.bank", "-o", "r.html", "--trace", "x.json")
    assert "no trace" in refused(errors.RequestError, *arguments)
    assert ".html" in refused(errors.RequestError, "report", made / "one.bank", "-o", "r.pdf")
