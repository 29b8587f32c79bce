"""Run the networks of one denoising step in this process: ControlNets, then a UNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

from torch import Tensor

from imprompt_serving.backends import Engine
from imprompt_serving.denoiser.batch import RowSlice
from imprompt_serving.denoiser.control_plan import ControlPlan, Tensors, controlled_rows
from imprompt_serving.denoiser.protocol import LoopJob
from imprompt_serving.gpu import LoraEngine, run_on_tensors
from imprompt_serving.specs import Bundle, CallRows


class StepNetworks:
    """The UNets of a bundle (`unet` for pictures, `motion_unet` for clips) and its ControlNets, by name.

    Rows without a ControlNet share the UNet call of rows with one, with residuals of zero. Adding zeros costs next to
    nothing, while a separate call would read all weights again.
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
        """The plan of the last step, keyed by the first job of its batch, so that its memory is freed with that job."""

    def __call__(self, slices: Sequence[RowSlice], inputs: Mapping[str, Tensor]) -> Tensor:
        """Predict the noise for `inputs`: the rows of `slices` in order, and padding after them."""
        tensors = dict(inputs)
        clips = tensors["sample"].ndim == 5
        if self._bundle.controlnets:
            tensors |= self._residuals(self._current_plan(slices, tensors), tensors)
        unet = self._unets["motion_unet" if clips else "unet"]
        if self._bundle.loras and isinstance(unet, LoraEngine):
            unet.use_loras(slices[0].job.request.settings.lora)
        return run_on_tensors(unet, tensors)["noise_pred"]

    def _current_plan(self, slices: Sequence[RowSlice], tensors: Tensors) -> ControlPlan:
        """Return the plan of the last step if rows and prompts are still the same, or else make a new one."""
        controlled, job = controlled_rows(slices), slices[0].job
        if job not in self._plan or not self._plan[job].fits(controlled, tensors):
            self._plan.clear()  # frees its memory before the new plan needs some
            rows = sum(part.stop - part.start for part in slices)
            self._plan[job] = ControlPlan(self._bundle, self._call_rows, controlled, rows, tensors)
        return self._plan[job]

    def _residuals(self, plan: ControlPlan, tensors: Tensors) -> Tensors:
        """Run the ControlNets and return the sum of their residuals as UNet inputs, with an axis of frames for clips.

        Each net runs once over the rows that use it, or several times if these exceed the limit of rows per call.
        """
        limit = self._call_rows.most
        total: Tensors = {}
        for net in plan.nets:
            inputs = net.inputs(tensors)
            for first in range(0, net.rows, limit):
                rows = {name: value[first : first + limit] for name, value in inputs.items()}
                answer = run_on_tensors(self._controlnets[net.name], rows)
                if not total and plan.covers_batch(net, answer):
                    total = answer  # the caller of an engine owns its outputs, so later nets may add to them
                    continue
                total = total or plan.residual_buffers()
                for batch_rows, own_rows in net.destinations(first, len(rows["sample"])):
                    for name, value in answer.items():
                        target = total[name][batch_rows]
                        # The first net overwrites what the last step left in its rows.
                        target.copy_(value[own_rows]) if net is plan.nets[0] else target.add_(value[own_rows])
        return plan.unet_inputs(total or plan.residual_buffers())
