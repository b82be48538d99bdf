"""The guide's accuracy debugging in Python, under the names of the plugin's `QuantAnalysis`.

    qa = qflow.QuantAnalysis(float_net, calibration_model, "fake_quant")
    qa.auto_find_bad_case(dataloader)
    qa.run()
    qa.compare_per_layer()
    table = qa.sensitivity()
    qflow.to_frame(table)               # any record as a pandas frame

These differences from the plugin are on purpose: a bad case is one sample, not one item of the loader; the worst over
all outputs compares each output with its own mean, so that an output of large numbers does not always decide; `.pt`
files hold builtin types only. Several devices are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qflow.analysis.advice.advisor import advise
from qflow.analysis.advice.text import advice_text
from qflow.analysis.badcases.files import CASE_FILE, BadcaseInputs, SavedBadcases, load_badcases, save_badcases
from qflow.analysis.badcases.find import find_badcases
from qflow.analysis.layers.compare import compare_layers, filtered
from qflow.analysis.layers.text import layers_csv, layers_text
from qflow.analysis.measures.advice import Advice
from qflow.analysis.measures.metrics import CUSTOM, custom_metric
from qflow.analysis.measures.tables import BadcaseTable, LayerTable, SensitivityTable
from qflow.analysis.sensitivity.candidates import candidates
from qflow.analysis.sensitivity.measure import sensitivity
from qflow.analysis.sensitivity.sensitive_ops import write_sensitive_ops
from qflow.api.arguments import Names, chosen_rows, filters, folder_at, metric_name, names_of, whole
from qflow.api.cases import Items, kept_cases, not_items, require_fit, require_numbers
from qflow.api.library import ranked
from qflow.api.model_pair import ModelPair, on, only, same
from qflow.api.plugin_names import ModuleNameQconfigSetter
from qflow.api.prepared import Prepared
from qflow.api.states import Frames, compared, with_state
from qflow.core.errors import ConfigError, DataError, ModelError
from qflow.core.settings import COMPARISONS, SensitivitySettings
from qflow.core.temporary import TemporaryFolder
from qflow.quant.trace.calling import copied

SPARE = 4  # at least so many inputs are kept, because the means and thus the ranking change during the search


class QuantAnalysis:
    """Analyses why a calibrated model differs from float: bad cases, layer comparison, sensitivity, advice.

    Every method returns its record (`qflow.to_frame` makes a pandas frame of it) and writes the plugin's files into
    `out_dir`. The models run in eval mode on one device, and their state is restored afterwards.
    """

    def __init__(
        self,
        baseline_model: nn.Module,
        analysis_model: Prepared,
        analysis_model_type: str = "fake_quant",
        device_ids: Any = None,
        post_process: Callable[..., Any] | None = None,
        out_dir: str | Path = "./horizon_quant_analysis",
    ) -> None:
        """Take the float model and the calibrated model that `qflow.prepare` made of it.

        `post_process(module, inputs, outputs)` is a forward hook on both models whose return values are compared as
        outputs. `device_ids` is the device to run on (an int is a CUDA device); None is the device of the analysis
        model. Raises ConfigError or ModelError.
        """
        if analysis_model_type != "fake_quant":
            raise ConfigError(
                f"analysis_model_type is fake_quant here, but got {analysis_model_type!r}. The plugin's others "
                "(quantized, hbir, pre_export, export, convert) compare what it exports: use its own QuantAnalysis."
            )
        if post_process is not None and not callable(post_process):
            raise ConfigError(
                f"post_process is a function, but got {type(post_process).__name__}. Give a forward hook."
            )
        self.pair = ModelPair(baseline_model, analysis_model, device_ids)
        self.post_process, self.out_dir = post_process, folder_at(out_dir)
        self._cases: SavedBadcases | None = None
        self._done: dict[str, tuple[str, Any]] = {}

    # ---- bad cases

    def auto_find_bad_case(
        self,
        data_generator: Iterable[Any],
        num_steps: int | None = None,
        metric: str = "L1",
        device: Any = None,
        custom_metric_func: Callable[[Tensor, Tensor], Any] | None = None,
        custom_metric_order_seq: str | None = None,
        cached_attrs: Any = None,
        topk: int = 1,
        compare: str = "fair",
        sequences: Sequence[int] | None = None,
    ) -> BadcaseTable:
        """Search all items of `data_generator`, or `num_steps` of them, and set the worst sample as the bad case.

        An item is what the model takes (a tuple or list is splatted, a dict becomes keywords); what the example inputs
        lacked, such as targets, is left out. `metric` is Cosine, MSE, L1, KL, SQNR or Atol in upper or lower case, or
        `custom` with `custom_metric_func(float output, calibrated output)`, which returns a number for one sample
        `[1, ...]`, and its order from bad to good, `ascending` or `descending`. The `topk` worst samples become bad
        cases, on all of which sensitivity runs. With `compare="fair"` the worst have the largest sum over outputs of
        distance / mean distance of the output; with `"raw"`, as in the plugin, the worst number in any output.
        If the model was prepared with `cached_attrs`, items are frames in order, `sequences` are the lengths of the
        sequences in items (None: one), and both models run from the state of the float model before each frame.
        Writes badcase.txt, badcase.pt and all_badcase_info.pt. Raises ConfigError or DataError.
        """
        custom = custom_metric(metric, custom_metric_func, custom_metric_order_seq)
        name = metric_name(metric, (*COMPARISONS, CUSTOM))
        whole("topk", topk, "bad cases")
        if isinstance(data_generator, (Tensor, Mapping)) or not isinstance(data_generator, Iterable):
            raise not_items(data_generator)
        inputs, pair, items = BadcaseInputs(), self.pair, Items(self.pair, data_generator)
        frames = Frames(pair, cached_attrs, sequences)
        with items.explained(device), pair.at_work(device, self.post_process) as target:
            table = find_badcases(
                pair.model,
                pair.prepared,
                frames.of(items.on(target)),
                metric=name,
                count=max(topk, SPARE),
                num_steps=num_steps,
                custom=custom,
                compare=compare,
                inputs=inputs,
            )
        table = kept_cases(frames.named(table), inputs, topk)
        save_badcases(self.out_dir, table, inputs)
        samples = {i: (x, (None, None)) for i, x in inputs.samples.items()}
        first = inputs.samples[table.chosen[0]]
        self._set(SavedBadcases(first, (None, None), table.index, table.worst, samples, table.chosen))
        return table

    def set_bad_case(
        self, data: Any, baseline_model_cached_attr: Any = None, analysis_model_cached_attr: Any = None
    ) -> SavedBadcases:
        """Set `data`, an item as in `auto_find_bad_case`, as the bad case.

        A model with `cached_attrs` starts from `baseline_model_cached_attr`, values by attribute, or from the start of
        a sequence (the other argument is None or equal). Raises ConfigError; DataError if the models do not take the
        item, or if it holds NaN.
        """
        inputs = self.pair.inputs(data)
        inputs = with_state(self.pair, inputs, baseline_model_cached_attr, analysis_model_cached_attr)
        require_numbers(self.pair, inputs)
        require_fit(self.pair, inputs, "a bad case")
        return self._set(SavedBadcases(copied(on("cpu", inputs))))

    def save_bad_case(self) -> Path:
        """Write the bad case to badcase.pt in `out_dir`. Raises DataError for other types than tensors and builtins."""
        inputs = self._held().inputs
        table = BadcaseTable(1, {}, {}, dict.fromkeys(COMPARISONS, 0), "L1", (0,))
        with TemporaryFolder(self.out_dir) as folder:  # the other files of a search are kept
            save_badcases(Path(folder), table, BadcaseInputs({0: inputs}))
            return (Path(folder) / CASE_FILE).replace(self.out_dir / CASE_FILE)

    def load_bad_case(self, filename: str | Path | None = None) -> SavedBadcases:
        """Set the bad case saved in `out_dir` or another folder, with the result of its search if that is there too.

        All `topk` bad cases are restored, or one if the files do not name the chosen ones. Raises DataError if there
        is none, or if the models do not take it.
        """
        path = self.out_dir if filename is None else Path(filename)
        folder = path.parent if path.name == CASE_FILE else path
        if folder.is_file():
            raise DataError(f"A bad case is read from {CASE_FILE}, but got {path.name}. Rename it, or give its folder.")
        saved, pair = load_badcases(folder), self.pair
        samples = {i: (with_state(pair, pair.inputs(x), *attrs), attrs) for i, (x, attrs) in saved.samples.items()}
        inputs = with_state(pair, pair.inputs(saved.inputs), *saved.attrs)
        saved = dataclasses.replace(saved, inputs=inputs, samples=samples)
        require_fit(self.pair, saved.inputs, "a bad case")
        alike = tuple(i for i, (x, _) in samples.items() if same(x, saved.inputs))
        if not alike:  # the bad case was set by hand after the search
            return self._set(dataclasses.replace(saved, index={}, worst={}, chosen=()))
        own = saved.chosen[:1] and saved.chosen[0] in alike
        return self._set(dataclasses.replace(saved, chosen=saved.chosen if own else alike[:1]))

    # ---- tables

    def run(self, device: Any = None, index: int | None = None) -> LayerTable:
        """Run both models on the bad case, or on searched sample `index`, and compare every operator.

        Values are compared while the models run, and nothing is dumped. Where the operator calls of the model cannot
        be run one by one, full forward passes are compared, and `findings` says what is empty then and why. Raises
        ConfigError without a bad case or for an index that is not kept.
        """
        case = self._case(index)
        with self.pair.at_work(device) as target:
            table = compare_layers(self.pair.model, self.pair.prepared, on(target, case))
        self._done["layers"] = self.pair.state, table
        return table

    def compare_per_layer(self, prefixes: Names = None, types: Names = None) -> LayerTable:
        """Return the comparison of the last `run` (`run` is called if there is none) with its rows filtered.

        A row stays if either filter matches: `prefixes` of names, or `types` (a class, a full name or its last part) of
        the float or the calibrated model (`Conv2dBNReLU`). Writes compare_per_layer_out.txt and .csv.
        """
        table = filtered(self._last("layers", self.pair.state) or self.run(), *filters(prefixes, types))
        if not table.rows:
            raise ConfigError(f"prefixes and types choose rows, but got none by {prefixes} and {types}. Give others.")
        for ending, text in (("txt", layers_text(table)), ("csv", layers_csv(table))):
            (self.out_dir / f"compare_per_layer_out.{ending}").write_text(text)
        return table

    def sensitivity(
        self,
        device: Any = None,
        metric: str = "L1",
        reverse: bool = False,
        output_names: Sequence[str] | str | None = None,
        prefixes: Names = None,
        types: Names = None,
        method: str = "exact",
    ) -> SensitivityTable:
        """Measure each quantizer alone, on the bad cases and the worst sample of each output under `metric`.

        `output_names` are the outputs to compare; `prefixes` and `types` choose the rows to measure (as in
        `compare_per_layer`). `reverse` returns the least sensitive first. The files, which setters read, always have
        the most sensitive first: output_<name>_<metric>_sensitive_ops.txt and .pt, and one `merged`. `method` is
        exact, screened or estimate. Raises ConfigError.
        """
        settings = SensitivitySettings(metric=metric_name(metric, COMPARISONS), method=method)
        names = None if output_names is None else names_of(output_names)
        case, pair = self._case(None), self.pair
        with pair.at_work(device, self.post_process) as target:
            outputs = pair.outputs(on(target, case), names)
            cases = [compared(on(target, case), names) for case in self._worst(settings.metric, outputs)]
            rows = chosen_rows(candidates(pair.prepared), *filters(prefixes, types))
            with pair.hooked(None if names is None else only(outputs)):
                rows = rows if names is None else pair.live(rows, cases[0])
                table = sensitivity(pair.model, pair.prepared, cases, settings=settings, rows=rows)
        self._done["sensitivity"] = pair.state, table
        ranked(pair.prepared, table.activation_scores())
        write_sensitive_ops(table, self.out_dir)
        return dataclasses.replace(table, rows=table.rows[::-1]) if reverse else table

    def advise(self) -> tuple[Advice, ...]:
        """Return what to change, by expected gain, from the last sensitivity and comparison (run if there is none).

        `setter` applies it. Writes abnormal_layer_advisor.txt. Raises ModelError without calibration statistics.
        """
        stats = self.pair.prepared.stats
        if stats is None:
            where = "a state dict does not hold them. Call qflow.calibrate."
            raise ModelError(f"Advice rests on calibration statistics, but got none: {where}")
        state = self.pair.state
        table = self._last("sensitivity", state) or self.sensitivity()
        layers = self._last("layers", state) or self.run()
        found = advise(self.pair.prepared, stats, table, layers, self.pair.refusals())
        (self.out_dir / "abnormal_layer_advisor.txt").write_text(advice_text(found, None))
        return found

    def setter(self, advice: Sequence[Advice]) -> ModuleNameQconfigSetter:
        """Return a setter for `advice`, to precede others; without advice that the device bars beside earlier one."""
        return ModuleNameQconfigSetter(self.pair.agreed([(a.target, a.spec) for a in advice if a.spec]))

    def clean(self) -> None:
        """Forget the tables of `run` and `sensitivity`. Bad cases and files stay; there are no dumps to delete."""
        self._done.clear()

    def _set(self, cases: SavedBadcases) -> SavedBadcases:
        self._cases = cases
        self._done.clear()
        return cases

    def _held(self) -> SavedBadcases:
        if self._cases is None:
            way = "Call auto_find_bad_case, set_bad_case or load_bad_case."
            raise ConfigError(f"A bad case is needed first, but got none. {way}")
        return self._cases

    def _case(self, index: int | None) -> Any:
        """Return the inputs of the bad case, or of sample `index` that the search kept."""
        held = self._held()
        if index is not None and index not in held.samples:
            kept = f"index is a sample whose inputs the search kept ({', '.join(map(str, held.samples)) or 'none'})"
            raise ConfigError(f"{kept}, but got {index}. Raise topk, or call set_bad_case.")
        return held.inputs if index is None else held.samples[index][0]

    def _worst(self, metric: str, outputs: Sequence[str]) -> list[Any]:
        """Return the inputs of the bad cases, then of the worst sample of each of `outputs` under `metric`."""
        held = self._held()
        wanted = [*held.chosen, *(held.index[name].get(metric, -1) for name in outputs if name in held.index)]
        return [held.samples[i][0] for i in dict.fromkeys(wanted) if i in held.samples] or [held.inputs]

    def _last(self, what: str, state: str) -> Any:
        """Return the last table of this kind, or None if it is of another `state`: qconfig or scales have changed."""
        of, table = self._done.get(what, ("", None))
        return table if of == state else None
