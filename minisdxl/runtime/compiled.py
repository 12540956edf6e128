"""The U-Net through torch's compiler: one graph for each token plan, of which a picture has two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from atedm.plan import DENSE, TokenPlan
from minisdxl.unet import Text, UNet


class CompiledUNet:
    """Stands in for a :class:`UNet` that nobody trains.

    A plan is data to the U-Net and a constant to the compiler, so that no step waits for the device to learn which
    tokens stay. The first call with a plan or a shape compiles, which takes minutes at SDXL's size. What the compiler
    cannot trace runs as it is between two graphs: random rankings, and G-WPR that iterates until it settles (give it
    ``iterations``).
    """

    def __init__(self, unet: UNet, backend: str = "inductor", mode: str | None = None) -> None:
        """``backend`` and ``mode`` are ``torch.compile``'s; without a mode, CUDA graphs on a GPU and none elsewhere."""
        self.unet = unet
        on_gpu = next(unet.parameters()).is_cuda
        self.mode = "reduce-overhead" if mode is None and on_gpu and backend == "inductor" else mode
        self.backend = backend
        self.graphs: dict[TokenPlan, Callable[..., Tensor]] = {}

    @property
    def dtype(self) -> torch.dtype:
        """As :attr:`UNet.dtype`."""
        return self.unet.dtype

    def project_context(self, context: Tensor) -> Text:
        """As :meth:`UNet.project_context`, not compiled: it runs once a picture."""
        return self.unet.project_context(context)

    def __call__(self, x: Tensor, c_noise: Tensor, text: Text, vector: Tensor, plan: TokenPlan = DENSE) -> Tensor:
        """As :meth:`UNet.forward`, of what :meth:`project_context` gave.

        Raises ``ValueError`` where the compiler fails too, such as without ``g++``.
        """
        if plan not in self.graphs:
            self.graphs[plan] = torch.compile(self._with(plan), backend=self.backend, mode=self.mode)
        # The last step's output is no longer needed.
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
