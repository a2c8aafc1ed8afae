"""The report says what the run's numbers say, no more; it is one page, whole, and wholly its own."""

import base64
import csv
import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fake_run import ACCURACY, write_run
from initperf.core.checks import InitPerfError
from initperf.report.numbers.intervals import paired_difference, t_cdf, t_quantile
from initperf.report.numbers.results import read_run
from initperf.report.page import limitations, write_report
from initperf.report.words.findings import backends, levels_table, stretches, tables, verdict

VOID = {"meta", "img", "br", "link", "hr"}


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run")


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without figures: most of a page's time goes into them."""
    monkeypatch.setattr("initperf.report.page._figures", lambda run, other: "")


def rewrite(path, change):
    """Every row of a csv file through `change`, which returns the new row, or None to drop it."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    changed = [new for row in rows if (new := change(dict(row))) is not None]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(changed)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 200), st.floats(0.5, 0.9999))
def test_the_t_quantile_is_scipys(freedom, probability):
    assert t_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 200), st.floats(-50, 50))
def test_the_t_distribution_is_scipys(freedom, t):
    assert t_cdf(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), abs=1e-13)


def test_the_paired_interval_is_that_of_the_paired_t_test():
    noise = random.Random(0)
    for n in (2, 3, 5, 30):
        a, b = ([noise.gauss(mean, 1) for _ in range(n)] for mean in (0.5, 0))
        found = paired_difference(x - y for x, y in zip(a, b, strict=True))
        low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
        assert found.sign == int(low > 0) - int(high < 0)


def test_one_trial_gives_a_difference_without_an_interval():
    found = paired_difference([0.01])
    assert found.mean == 0.01
    assert math.isnan(found.low)
    assert found.sign == 0


def test_the_headline_is_computed_from_the_sparsest_level(folder):
    run = read_run(folder)
    means = [run.spread(3, kind, "early_stop_test_accuracy").mean for kind in run.kinds]
    expected = "At 4.2% of the weights the ticket reaches {:.1%}, re-initialized {:.1%}, shuffled {:.1%}".format(*means)
    assert verdict(run).headline.startswith(expected)
    assert "(5 trials)" in verdict(run).headline


def test_a_ticket_that_is_not_ahead_is_said_not_to_be(tmp_path):
    accuracy = ACCURACY | {"reinit": ACCURACY["ticket"], "ticket": (0.97, *ACCURACY["reinit"][1:])}
    found = verdict(read_run(write_run(tmp_path / "run", accuracy=accuracy)))
    assert "the ticket is not ahead of re-initialized:" in found.headline
    assert "behind at" in found.sentences[0].lower()


def test_an_interval_with_zero_inside_is_undecided(tmp_path):
    accuracy = {"ticket": (0.97, 0.97), "reinit": (0, 0.9699)}
    run = read_run(write_run(tmp_path / "run", accuracy=accuracy, densities=(1, 0.5)))
    lead = run.lead(1, "reinit")
    assert lead.low < 0 < lead.high
    assert "Undecided at 50%" in verdict(run).sentences[0]


def test_one_trial_is_said_to_have_no_interval(tmp_path):
    run = read_run(write_run(tmp_path / "run", trials=1))
    assert "(1 trial)" in verdict(run).headline
    assert "no interval" in verdict(run).sentences[0]
    assert "1 trial: the paper used five." in limitations(run)


def test_exchanging_ticket_and_control_turns_the_difference_round(folder):
    before = read_run(folder).lead(2, "reinit")
    names = {"ticket": "reinit", "reinit": "ticket"}

    def exchange(row):
        return row if row["level"] == "0" else row | {"kind": names.get(row["kind"], row["kind"])}

    rewrite(folder / "results.csv", exchange)
    after = read_run(folder).lead(2, "reinit")
    assert (after.mean, after.low, after.high) == pytest.approx((-before.mean, -before.high, -before.low))


def test_the_order_of_the_rows_does_not_matter(folder):
    before = [verdict(read_run(folder)), tables(read_run(folder))]
    lines = (folder / "results.csv").read_text().splitlines()
    shuffled = random.Random(0).sample(lines[1:], len(lines) - 1)
    (folder / "results.csv").write_text("\n".join([lines[0], *shuffled]) + "\n")
    assert [verdict(read_run(folder)), tables(read_run(folder))] == before


def test_repeated_reinitializations_of_a_trial_count_as_one_pair(folder):
    before = read_run(folder).lead(1, "reinit")
    text = (folder / "results.csv").read_text()
    again = [line.split(",") for line in text.splitlines() if line.split(",")[1:3] == ["1", "reinit"]]
    for cells in again:
        cells[7] = str(float(cells[7]) + 0.1)  # early_stop_test_accuracy
    (folder / "results.csv").write_text(text + "\n".join(map(",".join, again)) + "\n")
    after = read_run(folder).lead(1, "reinit")
    assert after.mean == pytest.approx(before.mean - 0.05)
    assert after.high - after.low == pytest.approx(before.high - before.low)
    assert after.trials == 5


def test_a_lead_over_another_level_is_taken_from_that_level(folder):
    run = read_run(folder)
    own = {trial: run.by_trial(2, "ticket", "early_stop_test_accuracy")[trial] for trial in range(5)}
    dense = {trial: run.by_trial(0, "ticket", "early_stop_test_accuracy")[trial] for trial in range(5)}
    mean = sum(own[t] - dense[t] for t in range(5)) / 5
    assert mean != 0
    assert run.lead(2, "ticket", base=0).mean == pytest.approx(mean)


def test_networks_that_never_reach_the_dense_loss_are_counted_and_count_as_late(folder):
    def of_trials(reached):
        def change(row):
            if (row["level"], row["kind"]) == ("1", "reinit"):
                row["iterations_to_dense_best"] = str(reached.get(row["trial"], ""))
            return row

        rewrite(folder / "results.csv", change)
        return read_run(folder).reach(1, "reinit")

    assert of_trials({"0": 300, "1": 500, "2": 700}) == (700, 2, 5)
    assert of_trials({"0": 300, "1": 500}) == (math.inf, 3, 5)
    cells = [row for row in levels_table(read_run(folder)).rows if row[1] == "re-initialized"]
    assert cells[0][-1] == "> 1,000 (never: 3 of 5)"


def test_an_early_stop_at_the_last_iteration_is_marked_as_a_lower_bound(folder):
    run = read_run(folder)
    shuffled = [row[2] for row in levels_table(run).rows if row[1] == "shuffled"]
    assert shuffled == ["740", "≥ 1,000", "≥ 1,000"]
    assert any("lower bound" in text for text in limitations(run))


def test_stretches_of_levels_are_named_by_their_ends(tmp_path):
    densities = (1, 0.8, 0.64, 0.51, 0.41, 0.33)
    run = read_run(write_run(tmp_path / "run", accuracy={"ticket": (0.97,) * 6}, densities=densities))
    assert stretches(run, []) == ""
    assert stretches(run, [2]) == "at 64%"
    assert stretches(run, [1, 3, 4, 5]) == "at 80% and from 51% to 33%"
    assert stretches(run, [4, 5]) == "at 41% and 33%"
    assert stretches(run, [1, 3, 5]) == "at 80%, 51% and 33%"


def test_an_op_that_ran_on_the_reference_is_named(folder):
    assert backends(read_run(folder))[1] == "None of the 2 ops ran on the plain-torch reference."
    ops = {"sample_": {"numba": 3}, "moments": {"numba": 3, "reference": 1}}
    (folder / "summary.json").write_text(json.dumps({"ops": ops}))
    said = backends(read_run(folder))[1]
    assert said.startswith("moments ran on the plain-torch reference")


def test_dense_products_chosen_on_purpose_are_counted_and_are_not_the_reference(folder):
    ops = {"sample_": {"numba": 9}, "masked_linear": {"numba": 30, "mkl": 10}}
    (folder / "summary.json").write_text(json.dumps({"ops": ops}))
    said = backends(read_run(folder))[1]
    assert said.startswith("None of the 2 ops ran on the plain-torch reference.")
    assert "dense product in 25% of their calls" in said


def test_a_masked_step_slower_than_dense_is_said_to_be(folder):
    assert "0.80x (slower)" in str(tables(read_run(folder)))
    assert "slower than dense in 1 of 4 rows" in str(tables(read_run(folder)))


class Page(HTMLParser):
    """Open elements must close in order; collects what the page would load or link to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.links, self.tags = [], [], [], set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.images += [value for name, value in attributes if name == "src"]
        self.links += [value for name, value in attributes if name == "href"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_page_that_loads_nothing(folder):
    text = write_report(folder).read_text()
    page = Page(text)
    assert not page.tags & {"script", "link", "iframe"}
    assert len(page.images) == 5
    assert "@import" not in text
    assert "url(" not in text
    for image in page.images:
        head, data = image.split(",", 1)
        assert head == "data:image/svg+xml;base64"
        figure = base64.b64decode(data).decode()
        assert ElementTree.fromstring(figure).tag.endswith("svg")
        assert not re.search(r'href="(?!#)', figure)
    assert all((folder / link).is_file() for link in page.links)


def test_the_report_carries_verdict_tables_recipe_and_data_attribution(folder, undrawn):
    text = write_report(folder).read_text()
    run = read_run(folder)
    for expected in (verdict(run).headline, "reduced budget", "CC BY 4.0", "versions.torch", "2.13.0", "rng_version"):
        assert expected in text
    for table in tables(run):
        assert all(cell.replace(">", "&gt;") in text for row in table.rows for cell in row)


def test_the_report_is_the_same_when_written_again(folder):
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


def test_text_from_the_run_cannot_become_markup(tmp_path, undrawn):
    folder = write_run(tmp_path / "run", recipe="<script>x</script>", attribution="<b>&", budget='"<i>"')
    page = Page(write_report(folder).read_text())
    assert not page.tags & {"script", "i"}


def test_a_run_that_was_cut_off_after_its_results_still_gets_a_report(folder):
    for name in ("curves.csv", "steps.csv", "summary.json"):
        (folder / name).unlink()
    rewrite(folder / "results.csv", lambda row: row if row["level"] in "01" and row["kind"] != "shuffle" else None)
    assert len(Page(write_report(folder).read_text()).images) == 2


def test_a_run_with_networks_missing_is_labelled_unfinished(folder, undrawn):
    assert "unfinished" not in write_report(folder).read_text().lower()
    rewrite(folder / "results.csv", lambda row: row if (row["trial"], row["level"]) != ("4", "3") else None)
    text = write_report(folder).read_text()
    assert "<b>unfinished</b>" in text
    assert "Unfinished: 47 of 50 networks" in text


def test_a_run_with_only_the_dense_network_says_so(folder):
    rewrite(folder / "results.csv", lambda row: row if row["level"] == "0" else None)
    assert "Only the dense network is trained so far" in write_report(folder).read_text()


def test_a_second_run_is_set_beside_the_first(folder, tmp_path):
    other = write_run(tmp_path / "fast", seed=1, optimizer={"lr": 0.006})
    text = write_report(folder, other).read_text()
    Page(text)
    assert "Compared with fast" in text
    assert "optimizer.lr" in text
    assert verdict(read_run(other)).headline in text


def test_a_run_compared_with_its_twin_is_found_equal_but_for_the_clock(folder, tmp_path, undrawn):
    twin = write_run(tmp_path / "twin")
    rewrite(twin / "results.csv", lambda row: row | {"train_seconds": "99"})
    assert "equal in every digit" in write_report(folder, twin).read_text()
    rewrite(twin / "results.csv", lambda row: row | {"early_stop_val_loss": row["early_stop_val_loss"] + "1"})
    assert "equal in every digit" not in write_report(folder, twin).read_text()


def test_a_failed_write_leaves_the_old_report_and_nothing_else(folder, monkeypatch, undrawn):
    before = write_report(folder).read_bytes()
    names = sorted(p.name for p in folder.iterdir())
    rewrite(folder / "results.csv", lambda row: row if row["trial"] == "0" else None)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == names


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("results.csv", None, "results.csv"),
        ("config.json", None, "config.json"),
        ("results.csv", "", "columns"),
        ("results.csv", "trial,level\n0,0\n", "columns"),
        ("results.csv", "HEADER\n0,0,ticket,1.0,100,100,x,0.9,0.9,100,0,1\n", "line 2"),
        ("results.csv", "HEADER\n0,0,ticket,1.0,100\n", "line 2"),
        ("results.csv", "HEADER\n0,0,ticket,1.0,100,100,0.1,,,100,0,1\n", "no test accuracy"),
        ("results.csv", "HEADER\n", "dense network"),
        ("config.json", "{", "JSON"),
        ("config.json", "[]", "JSON object"),
        ("steps.csv", "level\n", "columns"),
        ("summary.json", "{", "JSON"),
    ],
)
def test_a_damaged_run_folder_is_named_and_nothing_is_written(folder, name, damage, message):
    header = (folder / "results.csv").read_text().splitlines()[0]
    if damage is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(damage.replace("HEADER", header))
    names = sorted(p.name for p in folder.iterdir())
    with pytest.raises(InitPerfError, match=message):
        write_report(folder)
    assert sorted(p.name for p in folder.iterdir()) == names
