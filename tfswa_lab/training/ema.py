"""An average of the weights over the last steps: what is validated, saved and used.

Notebook: 07_training
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of a model that `update_parameters(model)` pulls towards it by `1 - decay`.

    It remembers about `1 / (1 - decay)` steps, but never more than a ninth of the steps so far:
    the first weights are worth forgetting. A decay of 0 copies the model.

    The running statistics of batch norms are averaged like the weights: they describe activations
    that weights of the same age make; a plain copy would describe those of the newest. The copy
    stays in evaluation mode.

    Source: Polyak & Juditsky, SIAM J. Control Optim. 30(4), 1992; here exponentially weighted.
    """

    def pull(averages: list[Tensor], values: list[Tensor], _: Tensor) -> None:
        steps = average.n_averaged.item()  # on the CPU: no wait for a card
        get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(averages, values, steps)

    average = AveragedModel(model, multi_avg_fn=pull, use_buffers=True)
    return average.requires_grad_(False).eval()
