"""The networks of one denoising step: ControlNets, then a UNet, all in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

from torch import Tensor

from imprompt_serving.backends import Engine
from imprompt_serving.denoiser.batch import RowSlice
from imprompt_serving.denoiser.control_plan import ControlPlan, Tensors, uses_of
from imprompt_serving.denoiser.protocol import LoopJob
from imprompt_serving.gpu import LoraEngine, run_on_tensors
from imprompt_serving.specs import Bundle, CallRows


class StepNetworks:
    """The UNets of a bundle (that for pictures, and that for clips) and its ControlNets, by name.

    Rows without control share the call of rows with it, with residuals of zero: adding them costs next to nothing,
    while a call of its own would cost a whole pass over the weights.
    """

    def __init__(
        self,
        bundle: Bundle,
        unets: Mapping[str, Engine],
        controlnets: Mapping[str, Engine],
        call_rows: CallRows | None = None,
    ) -> None:
        self._bundle, self._unets, self._controlnets = bundle, unets, controlnets
        self._call_rows = call_rows or bundle.shapes.call_rows()
        self._plan: WeakKeyDictionary[LoopJob, ControlPlan] = WeakKeyDictionary()
        """The plan of the last step, by the first job of its batch: its memory is freed with that job."""

    def __call__(self, parts: Sequence[RowSlice], inputs: Mapping[str, Tensor]) -> Tensor:
        """The noise that the UNet predicts for `inputs`: the rows of `parts` one after the other, and padding."""
        tensors = dict(inputs)
        clips = tensors["sample"].ndim == 5
        if self._bundle.controlnets:
            tensors |= self._residuals(self._planned(parts, tensors), tensors)
        unet = self._unets["motion_unet" if clips else "unet"]
        if self._bundle.loras and isinstance(unet, LoraEngine):
            unet.use_loras(parts[0].job.request.settings.lora)
        return run_on_tensors(unet, tensors)["noise_pred"]

    def _planned(self, parts: Sequence[RowSlice], tensors: Tensors) -> ControlPlan:
        """What the ControlNets of a step do; the plan of the last step while its rows and prompts stay."""
        uses, job = uses_of(parts), parts[0].job
        if job not in self._plan or not self._plan[job].fits(uses, tensors):
            self._plan.clear()  # first, so that its memory is there for the new one
            rows = sum(part.stop - part.start for part in parts)
            self._plan[job] = ControlPlan(self._bundle, self._call_rows, uses, rows, tensors)
        return self._plan[job]

    def _residuals(self, plan: ControlPlan, tensors: Tensors) -> Tensors:
        """What the ControlNets of all rows add: inputs of the UNet, with an axis of frames for clips.

        Each net runs once over the rows that use it, or as often as its limit of rows demands.
        """
        limit = self._call_rows.most
        total: Tensors = {}
        for net in plan.nets:
            inputs = net.inputs(tensors)
            for first in range(0, net.rows, limit):
                rows = {name: value[first : first + limit] for name, value in inputs.items()}
                answer = run_on_tensors(self._controlnets[net.name], rows)
                if not total and plan.is_whole(net, answer):
                    total = answer  # the answers of an engine are the caller's own: later nets add to them
                    continue
                total = total or plan.cleared(answer)
                for there, here in net.places(first, len(rows["sample"])):
                    for name, value in answer.items():
                        target = total[name][there]
                        # The first net overwrites what the last step left in its rows.
                        target.copy_(value[here]) if net is plan.nets[0] else target.add_(value[here])
        return plan.by_row(total or plan.cleared({}))
