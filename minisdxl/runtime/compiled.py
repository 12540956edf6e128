"""The compiled U-Net: ``torch.compile``, with one graph for each token plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atedm.plan import DENSE, TokenPlan
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
        self.graphs: dict[TokenPlan, Callable[..., Tensor]] = {}

    @property
    def dtype(self) -> torch.dtype:
        """As :attr:`UNet.dtype`."""
        return self.unet.dtype

    def project_context(self, context: Tensor) -> PromptKV:
        """As :meth:`UNet.project_context`. Not compiled, because it runs once per picture."""
        return self.unet.project_context(context)

    def __call__(self, x: Tensor, c_noise: Tensor, text: PromptKV, vector: Tensor, plan: TokenPlan = DENSE) -> Tensor:
        """As :meth:`UNet.forward`, with the keys and values of :meth:`project_context`.

        Raises ``ValueError`` also where the compiler fails, for example without ``g++``.
        """
        from torch._dynamo.exc import TorchDynamoException  # not above: the compiler takes a second to import

        if plan not in self.graphs:
            self.graphs[plan] = torch.compile(self._with(plan), backend=self.backend, mode=self.mode)
        # CUDA graphs reuse the memory of the last step's output, which is no longer needed.
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        try:
            return self.graphs[plan](x, c_noise, text, vector)
        except TorchDynamoException as error:
            why = " ".join(str(error).strip().partition("\n\n")[0].split())
            raise ValueError(f"the U-Net could not be compiled, expected a C++ compiler and Triton: {why}") from error

    def _with(self, plan: TokenPlan) -> Callable[..., Tensor]:
        def call(*inputs: Any) -> Tensor:
            return self.unet(*inputs, plan)

        return call
