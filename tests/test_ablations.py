"""The measured ablations: commands are accepted, a row has its bytes, a plot shows them all."""
import json
from xml.etree import ElementTree

import pytest

from experiments import ablations, plot_ablations
from experiments.ablations import FIGURES, VARIANTS
from run import options

ROW = {"test": {"score": 82.0}, "accounted": {"peak": 300 * 2**20}}


@pytest.mark.parametrize("name", VARIANTS)
def test_train_takes_the_flags_of_every_variant(name):
    args = options.parse(VARIANTS[name].flags.split(), "")
    assert (args.max_train_rows, args.epochs) == (20000, 1)
    assert VARIANTS[name].seeds == (3 if name in FIGURES["fig8"] else 2)


def test_every_variant_is_in_a_figure_and_commands_differ():
    assert {name for names in FIGURES.values() for name in names} == VARIANTS.keys()
    assert len({variant.flags for variant in VARIANTS.values()}) == len(VARIANTS)


@pytest.mark.slow
def test_a_frozen_encoder_and_dropped_rungs_lower_a_rows_bytes(glue):
    def peak(**changes):
        config = dict(task="sst2", model="nano", prompts="paper", method="lst", side="ladder", r=8,
                      keep=None, free=0, freeze=0, size=None, classify=False, as_authors=False,
                      seed=0, dtype="fp32", checkpoint=False, dropout=None, batch_size=4,
                      max_train_rows=32)
        return ablations.accounted(config | changes, str(glue))["peak"]

    lora, ladder = dict(method="lora"), peak()
    assert peak(side="alone") < ladder > peak(keep=[2])
    assert ladder < peak(**lora, freeze=2) < peak(**lora)
    assert peak(method="y-tuning", classify=True) > 0 < peak(classify=True)


@pytest.mark.parametrize("figure, labels", [("fig5", ["r32", "64", "16"]), ("fig6", ["0,2", "5"])])
def test_the_plot_has_a_mark_for_each_point_and_its_spread(tmp_path, figure, labels):
    rows = [{"variant": name, **ROW, "test": {"score": 80 + seed + i / 9}}
            for i, name in enumerate(VARIANTS) for seed in (0, 1)]
    rows = json.loads(json.dumps(rows))
    lines = plot_ablations.points(figure, rows)
    assert sum(len(points) for _, points in lines) == len(FIGURES[figure])
    plot_ablations.draw(tmp_path / "plot.svg", "title", lines)
    root = ElementTree.parse(tmp_path / "plot.svg").getroot()
    assert {*labels} <= {text.text for text in root.iter() if text.tag.endswith("text")}
    marks = [path for path in root.iter() if path.get("d", "").endswith("z")]
    assert len(marks) == len(FIGURES[figure])
