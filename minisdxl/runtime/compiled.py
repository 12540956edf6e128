"""The compiled U-Net: ``torch.compile``, with one graph for each token plan."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atedm.plan import DENSE, TokenPlan
from minisdxl.steps.evaluate import Tensors, evaluate
from minisdxl.steps.plan import StepPlan
from minisdxl.unet import PromptKV, UNet


class CompiledUNet:
    """A :class:`UNet` compiled for inference. Results differ by rounding.

    The first call with a token plan or a shape compiles, which takes minutes at SDXL's size; later calls are faster. A
    plan is a constant to the compiler, so no step waits for the device to tell how many tokens are kept. Random
    rankings cannot be traced, nor G-WPR that runs until it converges: they run uncompiled, between two graphs. G-WPR
    with a fixed number of ``iterations`` is traced.
    """

    def __init__(self, unet: UNet, backend: str = "inductor", mode: str | None = None) -> None:
        """``backend`` and ``mode`` are ``torch.compile``'s. The default mode uses CUDA graphs on a GPU."""
        self.unet = unet
        on_gpu = next(unet.parameters()).is_cuda
        self.mode = "reduce-overhead" if mode is None and on_gpu and backend == "inductor" else mode
        self.backend = backend
        self.graphs: dict[Hashable, Callable[..., Any]] = {}

    @property
    def dtype(self) -> torch.dtype:
        """As :attr:`UNet.dtype`."""
        return self.unet.dtype

    def project_context(self, context: Tensor) -> PromptKV:
        """As :meth:`UNet.project_context`. Not compiled, because it runs once per picture."""
        return self.unet.project_context(context)

    def __call__(self, x: Tensor, c_noise: Tensor, text: PromptKV, vector: Tensor, plan: TokenPlan = DENSE) -> Tensor:
        """As :meth:`UNet.forward`, with the keys and values of :meth:`project_context`.

        Raises ``ValueError`` as :meth:`run`.
        """
        return self.run(plan, lambda *inputs: self.unet(*inputs, plan), x, c_noise, text, vector)

    def evaluate(self, plan: StepPlan, *inputs: Any) -> tuple[Tensor, Tensors]:
        """As :func:`minisdxl.steps.evaluate.evaluate`, of this U-Net."""
        predicted, new = self.run(plan, partial(evaluate, self.unet, plan), *inputs)
        return predicted, {name: tensor.clone() for name, tensor in new.items()}  # CUDA graphs use their memory again

    def run(self, plan: Hashable, call: Callable[..., Any], *inputs: Any) -> Any:
        """``call(*inputs)``, compiled: the first ``call`` for each ``plan``, and with it for all later ones.

        Raises ``ValueError`` also where the compiler fails, for example without ``g++``.
        """
        from torch._dynamo.exc import TorchDynamoException  # not above: the compiler takes a second to import

        if plan not in self.graphs:
            self.graphs[plan] = torch.compile(call, backend=self.backend, mode=self.mode)
        # CUDA graphs reuse the memory of the last step's output, which is no longer needed.
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        try:
            return self.graphs[plan](*inputs)
        except TorchDynamoException as error:
            why = " ".join(str(error).strip().partition("\n\n")[0].split())
            raise ValueError(f"the U-Net could not be compiled, expected a C++ compiler and Triton: {why}") from error
