"""What a study found: a table of its trials, a page of pictures, and the best recipe, ready to train."""

import math
import statistics
import time
from dataclasses import dataclass
from html import escape
from pathlib import Path

import yaml

from dist_train import plots
from dist_train.bars import Bar, bar_chart
from dist_train.config import RunConfig
from dist_train.durable import replace_text
from dist_train.journal import counted_trials
from dist_train.metrics import goodness
from dist_train.page import Chart, Section, Table, write_page
from dist_train.remote import shown as shown_place
from dist_train.report import duration
from dist_train.settings import flatten, to_dict, unflatten
from dist_train.track import read_metrics
from dist_train.trial import mean_figures

SHOWN_BARS = 20
SHOWN_CURVES = 3
FIGURES = {"top1": "accuracy", "balanced": "balanced accuracy", "loss": "loss"}  # what a study's metric is called
_SMALL_WIDTH, _SMALL_HEIGHT = 300, 190  # of a field of dots, CSS pixels


@dataclass(frozen=True)
class Found:
    """What `write_study_report` wrote. Without a finished trial there is no best recipe; failure: why, once none is left to end."""

    page: Path
    best_recipe: Path | None
    summary: str
    failure: str


@dataclass(frozen=True)
class Row:
    """One finished trial. folds: its results, see trial.fold_result; values: their study metric, each training's best."""

    number: int
    params: dict
    folds: list[dict]
    values: list[float]
    folder: Path

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over the folds; 0 for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def last(self, metric: str) -> float | None:
        """Mean of the trainings' last evaluations; None for trials from before those were kept, and where one is no number."""
        values = [fold.get(f"last_{metric}") for fold in self.folds]
        return None if None in values else statistics.fmean(values)

    @property
    def seconds(self) -> float:
        return sum(fold["train_s"] for fold in self.folds)


@dataclass(frozen=True)
class Cut:
    """One trial that was ended early. value: its figure so far, if it had one; ended: how, and after how much."""

    number: int
    params: dict
    value: float | None
    ended: str


def write_study_report(plan, study) -> Found:
    """Write FOLDER/report.html and FOLDER/best.yaml, and print the table of trials. plan: study.Plan."""
    trials = counted_trials(study)
    metric, folds = plan.config.metric, plan.config.folds
    rows = [
        Row(t.number, t.params, t.user_attrs["folds"], [fold[metric] for fold in t.user_attrs["folds"]],
            plan.folder / t.user_attrs["folder"])
        for t in trials if t.state.name == "COMPLETE"
    ]  # fmt: skip
    rows.sort(key=lambda row: goodness(**mean_figures(row.folds), monitor=metric), reverse=True)
    cuts = [cut_of(t, folds) for t in trials if t.state.name == "PRUNED"]
    states = [_state(t) for t in trials]
    words = ("finished", "pruned", "diverged", "failed", "running", "waiting")
    summary = ", ".join(f"{n} {word}" for word in words if (n := states.count(word)))
    table = trial_table(rows, metric, cuts)
    if rows:
        print(Table(table.columns, table.rows[:SHOWN_BARS]).plain(), flush=True)
    best = plan.folder / "best.yaml" if rows else None
    if best:
        write_recipe(best, plan, rows[0])
    page = plan.folder / "report.html"
    how = f"{folds} folds" if folds else f"the {plan.base.data.val_split} split"
    shards = Path(shown_place(plan.base.data.shards)).name
    what = f"{Path(plan.config.recipe).stem} on {shards}, {how}, {plan.config.sampler}"
    sections = _sections(plan, study, trials, rows, cuts, table, best)
    subtitle = f"{what} · {summary} · {time.strftime('%Y-%m-%d %H:%M')}"
    write_page(page, plan.folder.resolve().name, subtitle, _cards(rows, metric), sections)
    return Found(page, best, summary, "" if {"finished", "running", "waiting"} & {*states} else failure_of(trials))


def failure_of(trials) -> str:
    """Why a study without a finished trial has none."""
    reasons = [t.user_attrs["why"] for t in trials if "why" in t.user_attrs]
    if reasons and all(_state(t) == "diverged" for t in trials):
        return (f"every trial diverged: lower optim.lr, or the range of it that is searched, or set optim.clip_norm. "
                f"The first one:\n  {reasons[0]}")  # fmt: skip
    return f"no trial could be trained. The first one:\n  {reasons[0]}" if reasons else ""


def cut_of(trial, folds: int) -> Cut:
    """A pruned or diverged trial of Optuna's, which reported its figures by hundredths of a fold."""
    step = trial.last_step
    after = "" if step is None else f" after {step / 100:g} folds" if folds else f" after {step}% of its training"
    return Cut(trial.number, trial.params, None if step is None else trial.intermediate_values[step], _state(trial) + after)


def _state(trial) -> str:
    if trial.state.name == "PRUNED":
        return "diverged" if "why" in trial.user_attrs else "pruned"
    return {"COMPLETE": "finished", "FAIL": "failed"}.get(trial.state.name, trial.state.name.lower())


def trial_table(rows: list[Row], metric: str, cuts: list[Cut] = ()) -> Table:
    """The trials, best first, then those that were cut short, with how far they came.

    The metric's mean and spread over the trainings' best evaluations, its mean over their last, epoch of the best, training time,
    settings.
    """
    names = list(dict.fromkeys(name for trial in [*rows, *cuts] for name in trial.params))
    columns = [("trial", True), (f"best {FIGURES[metric]}", True), ("±", True), ("last", True), ("best epoch", True),
               ("seconds", True), *([("ended", False)] if cuts else []), *((name, False) for name in names)]  # fmt: skip
    cells = [
        [str(row.number), shown(row.mean, metric), shown(row.spread, metric) if len(row.values) > 1 else "",
         shown(row.last(metric), metric), f"{statistics.fmean(fold['best_epoch'] for fold in row.folds):.1f}", f"{row.seconds:.1f}",
         *([""] if cuts else []), *(_param(row.params.get(name)) for name in names)]
        for row in rows
    ]  # fmt: skip
    cells += [
        [str(cut.number), shown(cut.value, metric), "", "", "", "", cut.ended, *(_param(cut.params.get(name)) for name in names)]
        for cut in cuts
    ]  # fmt: skip
    return Table(columns, cells)


def shown(value: float | None, metric: str) -> str:
    return "" if value is None else f"{value:.4f}" if metric == "loss" else f"{value:.2%}"


def write_recipe(path: Path, plan, row: Row) -> None:
    """The recipe of a trial: what differs from the defaults, with its figures in the first comment."""
    config = to_dict(plan.trial_config(row.params))
    data = config["data"]
    data |= {"folds": 0, "fold": 0}
    if plan.config.folds and set(data["val_split"].split("+")) & set(data["train_split"].split("+")):
        data["val_split"] = "none"  # a fold stood in its place
    defaults = flatten(to_dict(RunConfig()))
    tree = unflatten({name: value for name, value in flatten(config).items() if value != defaults[name]})
    figure = FIGURES[plan.config.metric]
    over = f"over {plan.config.folds} folds of the training split" if plan.config.folds else "on the validation split"
    spread = f" +- {shown(row.spread, plan.config.metric)}" if len(row.values) > 1 else ""
    last = shown(row.last(plan.config.metric), plan.config.metric)
    header = (
        f"# The best of the study {plan.path}, trial {row.number}: {described(row.params)}\n"
        f"# Validation {figure} {shown(row.mean, plan.config.metric)}{spread} {over}; it was chosen by that figure, so expect a\n"
        f"# little less of the test split.{f' The last evaluation of each training: {last}.' if last else ''}\n\n"
    )
    replace_text(path, header + yaml.safe_dump(tree, sort_keys=False))


def importance(study) -> dict[str, float]:
    """Share of the metric's variance that each searched setting explains (fANOVA, Hutter et al. 2014), largest first.

    Empty where there are too few finished trials, or nothing differs.
    """
    import optuna

    done = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
    searched = {name for t in done for name in t.params if len({str(u.params.get(name)) for u in done}) > 1}
    if len(done) < 4 or len(searched) < 2 or len({t.value for t in done}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = evaluator.evaluate(study, params=sorted(searched))  # get_param_importances would make their sum 1
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def mean_curve(row: Row, metric: str) -> tuple[list[float], list[float]]:
    """Epochs, and the metric's mean over the folds that were still trained then."""
    folds = []
    for fold in range(len(row.folds)):
        lines = read_metrics(row.folder / f"fold-{fold}" / "metrics.jsonl")
        folds.append([(line["epoch"], line[metric]) for line in lines if line["kind"] == "eval" and line.get(metric) is not None])
    together = [tuple(zip(*evaluations, strict=True)) for evaluations in zip(*folds, strict=False)]
    return [epochs[0] for epochs, _ in together], [statistics.fmean(values) for _, values in together]


def _cards(rows: list[Row], metric: str) -> list[tuple[str, str]]:
    if not rows:
        return []
    return [
        (f"best {FIGURES[metric]}", _with_spread(rows[0], metric)),
        ("its training", duration(rows[0].seconds)),
        ("finished trials", str(len(rows))),
        ("all trainings", duration(sum(row.seconds for row in rows))),
    ]


def _sections(plan, study, trials, rows: list[Row], cuts: list[Cut], table: Table, best: Path | None) -> list[Section]:
    metric, sections = plan.config.metric, []
    what = FIGURES[metric].capitalize()
    if rows:
        note = ("The mean over the folds; lines show one standard deviation to both sides." if len(rows[0].values) > 1 else
                "One training each, on the validation split.")  # fmt: skip
        note += " Of each training the best evaluation counts, which flatters it a little; the table has the last as well."
        first = rows[:SHOWN_BARS]
        figures = [Bar(_name(row), row.mean, row.spread, _with_spread(row, metric)) for row in first]
        times = [Bar(_name(row), row.seconds, 0.0, duration(row.seconds), "two") for row in first]
        text = (lambda y: f"{y:g}") if metric == "loss" else (lambda y: f"{y * 100:g}%")
        title = f"The best {SHOWN_BARS}" if len(rows) > SHOWN_BARS else "The trials"
        sections.append(Section(title, note, [
            Chart(f"{what}: best with {_name(rows[0])}", bar_chart(figures, text, zero=False)),
            Chart("Training time, seconds", bar_chart(times, lambda s: f"{s:g}"))
        ]))  # fmt: skip
        sections.append(Section("How it went", "", _course(plan, trials, rows, what, text)))
        sections += _settings_section(plan, study, rows, cuts, what, text)
    if table.rows:
        sections.append(Section("All trials" if cuts else "Finished trials", table=table))
    told = [f"trial {t.number} {_state(t)}: {t.user_attrs['why'] if _state(t) == 'failed' else t.user_attrs['why'].splitlines()[0]}"
            for t in trials if "why" in t.user_attrs]  # fmt: skip
    if told:
        sections.append(Section("Trials that could not be trained", text="\n\n".join(told)))
    if best:
        recipe = best.read_text().replace(plan.base.data.shards, shown_place(plan.base.data.shards))
        sections.append(Section("The best recipe", f"Train it with: dist-train train --config {best}", text=recipe))
    return sections


def _settings_section(plan, study, rows: list[Row], cuts: list[Cut], what: str, text) -> list[Section]:
    """Importances, variants and each searched setting against the figure; [] where there is nothing to see."""
    notes, charts = [], []
    if shares := importance(study):
        bars = [Bar(name, share, 0.0, f"{share:.0%}", "three") for name, share in shares.items()]
        charts.append(Chart("Importance", bar_chart(bars, lambda y: f"{y:.0%}")))
        notes.append("Importance is the share of the figure's variance over all finished trials that a setting explains by itself "
                     "(fANOVA).")  # fmt: skip
    if bars := variant_bars(rows, plan.config.metric):
        charts.append(Chart(f"{what} by variant", bar_chart(bars, text, zero=False)))
        notes.append("A variant's figure is the mean of its finished trials, with their standard deviation.")
    fields = [Chart(name, svg) for name in [*plan.space.ranges, *plan.space.choices]
              if (svg := setting_field(plan.space, name, rows, cuts, text))]  # fmt: skip
    if fields:
        notes.append(f"Below, a dot is a finished trial, its {what.lower()} upwards"
                     + ("; a cross at the foot is one that was pruned or diverged." if cuts else "."))  # fmt: skip
    return [Section("Which settings matter", " ".join(notes), charts, small_charts=fields)] if charts or fields else []


def variant_bars(rows: list[Row], metric: str) -> list[Bar]:
    """The mean of each variant's trials, best first; [] where the bars of the trials themselves say as much.

    Trials of equal settings are the same trainings, and count once.
    """
    members: dict[str, list[Row]] = {}
    for row in {row.folder: row for row in rows if "variant" in row.params}.values():
        members.setdefault(row.params["variant"], []).append(row)
    if len(members) < 2 or (len(rows) <= SHOWN_BARS and all(len(own) == 1 for own in members.values())):
        return []
    bars = []
    for name, own in members.items():
        mean = statistics.fmean(row.mean for row in own)
        spread = statistics.stdev([row.mean for row in own]) if len(own) > 1 else own[0].spread
        bars.append(Bar(name, mean, spread, shown(mean, metric) + (f" ± {shown(spread, metric)}" if spread else ""), "three"))
    return sorted(bars, key=lambda bar: bar.value, reverse=metric != "loss")


def setting_field(space, name: str, rows: list[Row], cuts: list[Cut], y_text) -> str:
    """A searched setting against the figure, a dot a finished trial, a cross at the foot for one cut short. space: search.Space.

    A range lies as it is searched, by its logarithm where that is drawn; choices lie side by side. Returns an <svg> element, or ""
    where fewer than two values have a finished trial.
    """
    place, ticks = _axis(space, name)
    dots = [(place(row.params[name]), row) for row in rows if name in row.params and math.isfinite(row.mean)]
    if len({x for x, _ in dots}) < 2:
        return ""
    y_ticks = plots.nice_ticks(min(row.mean for _, row in dots), max(row.mean for _, row in dots), 4)
    low, high = min(y_ticks[0], *(row.mean for _, row in dots)), max(y_ticks[-1], *(row.mean for _, row in dots))
    left, right, top, foot = 50, 12, 10, _SMALL_HEIGHT - 26

    def x_at(x: float) -> float:
        return left + 8 + x * (_SMALL_WIDTH - left - right - 16)

    def y_at(y: float) -> float:
        return top + (high - y) / ((high - low) or 1) * (foot - top - 10)

    spoken = f"{name} against the figure of {len(dots)} trials"
    parts = [f'<svg class="chart" viewBox="0 0 {_SMALL_WIDTH} {_SMALL_HEIGHT}" role="img" aria-label="{escape(spoken)}">']
    for tick in y_ticks:
        parts.append(plots.segment(left, y_at(tick), _SMALL_WIDTH - right, y_at(tick), "var(--line)"))
        parts.append(plots.text_at(left - 6, y_at(tick) + 4, y_text(tick), "end"))
    room = (_SMALL_WIDTH - left - right) / max(len(ticks), 1)
    for x, label in ticks:
        label = label if plots.text_width(label) <= room else label[: max(1, int(room / 6.6) - 1)] + "…"
        parts.append(plots.text_at(x_at(x), foot + 16, label, "middle"))
    for x, row in dots:
        note = f"trial {row.number}: {_param(row.params[name])}, {y_text(round(row.mean, 4))}"
        parts.append(f'<circle cx="{x_at(x):.1f}" cy="{y_at(row.mean):.1f}" r="3.5" fill="var(--one)" opacity="0.7">')
        parts.append(f"<title>{escape(note)}</title></circle>")
    crosses = [x_at(place(cut.params[name])) for cut in cuts if name in cut.params]
    parts += [plots.text_at(x, foot + 2, "×", "middle", "var(--two)") for x in crosses]
    return "".join([*parts, "</svg>"])


def _axis(space, name: str):
    """(value -> its place from 0 to 1, [(place, label)]) of a searched setting."""
    if name in space.choices:
        texts = list(space.choices[name])
        middles = {text: (i + 0.5) / len(texts) for i, text in enumerate(texts)}
        return middles.__getitem__, [(middle, _param(text)) for text, middle in middles.items()]
    low, high, is_log = space.ranges[name]["low"], space.ranges[name]["high"], space.ranges[name].get("log")
    scale = math.log if is_log else float

    def place(value: float) -> float:
        return (scale(value) - scale(low)) / (scale(high) - scale(low))

    ticks = plots.nice_ticks(low, high, 4)
    if is_log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [k * 10.0**power for power in powers for k in ((1,) if len(powers) > 3 else (1, 2, 5))]
    ticks = [tick for tick in ticks if low <= tick <= high] or [low, high]
    return place, [(place(tick), f"{tick:g}") for tick in ticks]


def _course(plan, trials, rows: list[Row], what: str, text) -> list[Chart]:
    """The figure of each trial in the order they were drawn, the best so far; and the best trials' curves."""
    metric, by_number = plan.config.metric, sorted(rows, key=lambda row: row.number)
    better, best, so_far = (min if metric == "loss" else max), None, []
    for row in by_number:
        best = row.mean if best is None else better(best, row.mean)
        so_far.append(best)
    numbers = [float(row.number) for row in by_number]
    each = plots.Curve("trial", numbers, [row.mean for row in by_number], 1, dots=True, band=True)
    charts = [Chart(f"{what} by trial", plots.line_chart([each, plots.Curve("best so far", numbers, so_far)], "trial", text),
                    [("best so far", "one"), ("trial", "two")])]  # fmt: skip
    curves = [plots.Curve(_name(row), *mean_curve(row, metric), colour) for colour, row in enumerate(rows[:SHOWN_CURVES])]
    if svg := plots.line_chart(curves, "epoch", text):
        legend = [(_name(row), colour) for row, colour in zip(rows, ("one", "two", "three"), strict=False)]
        charts.append(Chart(f"{what} of the best by epoch", svg, legend))
    return charts


def _name(row: Row) -> str:
    variant = row.params.get("variant")
    others = {name.rpartition(".")[2]: value for name, value in row.params.items() if name != "variant"}
    return " ".join(filter(None, [variant, described(others, ", ")])) or f"trial {row.number}"


def _with_spread(row: Row, metric: str) -> str:
    return shown(row.mean, metric) + (f" ± {shown(row.spread, metric)}" if len(row.values) > 1 else "")


def described(params: dict, joint: str = "  ") -> str:
    return joint.join(f"{name} {_param(value)}" for name, value in params.items())


def _param(value) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)
