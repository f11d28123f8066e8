"""Hidden semi-Markov models as modules: the emissions of an HMM, with explicit durations.

Axis letters: `b` sequences, `t` frames, `d` features (or durations), `k` states.

Notebook: 11_hmm
"""

from __future__ import annotations

import torch
from torch import Tensor

from tfswa_lab.sequence import hsmm
from tfswa_lab.sequence.durations import LAWS
from tfswa_lab.sequence.em import EM
from tfswa_lab.sequence.hmm import GaussianHMM, set_from_counts


class GaussianHSMM(GaussianHMM):
    """A hidden semi-Markov model whose states emit from one Gaussian each.

    `score`, `posteriors`, `viterbi`, `sample_paths` and `fit` are those of `hsmm.py`.

    Args:
        num_states: k, at least 2.
        feature_dim: d.
        durations: `categorical`, `poisson`, `gamma` or `negative_binomial`.
        max_duration: the longest segment, in frames.
        min_duration: the shortest.
        covariance_type: as in `GaussianHMM`.
        right_censored: whether the last segment may go on behind the end of a sequence.
    """

    def __init__(
        self,
        num_states: int = 0,
        feature_dim: int = 0,
        durations: str = "gamma",
        max_duration: int = 100,
        min_duration: int = 1,
        covariance_type: str = "diag",
        right_censored: bool = True,
        **others,
    ):
        super().__init__(num_states, feature_dim, covariance_type, **others)
        if num_states < 2:
            raise ValueError("num_states is 1: segments need a state to change to")
        if durations not in LAWS:
            raise ValueError(f"durations is {durations!r}, expected one of {', '.join(LAWS)}")
        self.durations = LAWS[durations](num_states, max_duration, min_duration)
        self.right_censored = right_censored
        self.transmat = (1 - torch.eye(num_states)) / (num_states - 1)  # no segment follows itself
        self.sizes |= {
            "durations": durations,
            "max_duration": max_duration,
            "min_duration": min_duration,
            "right_censored": right_censored,
        }

    @property
    def num_parameters(self) -> int:
        """Free parameters: start, transitions to other states, emissions and durations."""
        k = self.num_states
        own = self.emissions.num_parameters + self.durations.num_parameters
        return (k - 1) + k * (k - 2) + own

    def score(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The log-likelihood of each sequence `(b)`, with gradients to all parameters."""
        return self._infer(hsmm.log_likelihood, x, lengths)

    def posteriors(self, x: Tensor, lengths: Tensor | None = None) -> hsmm.Posteriors:
        """See `hsmm.posteriors`."""
        return self._infer(hsmm.posteriors, x, lengths)

    def viterbi(self, x: Tensor, lengths: Tensor | None = None) -> hsmm.Decoded:
        """See `hsmm.viterbi`."""
        return self._infer(hsmm.viterbi, x, lengths)

    def sample_paths(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `hsmm.sample_paths`."""
        options = {"num_samples": num_samples, "generator": generator}
        return self._infer(hsmm.sample_paths, x, lengths, **options)

    def filter(self, *args, **kwargs):
        """Not for explicit durations."""
        raise NotImplementedError("explicit durations have no filter here: use posteriors")

    def _infer(self, function, x, lengths, **options):
        batch = self._batch(x, lengths)
        logs = self.emissions(batch.x, batch.lengths)
        model = (self.startprob, self.transmat, self.durations())
        options["right_censored"] = self.right_censored
        if not batch.batched:
            return function(logs[0], *model, **options)
        return function(logs, *model, batch.lengths, **options)

    @torch.no_grad()
    def sample(
        self, num_sequences: int, num_frames: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw sequences, the last segment cut: frames `(b, t, d)` and states `(b, t)`."""
        states = torch.empty(num_sequences, num_frames, dtype=torch.int64)
        laws, transmat = self.durations(), self.transmat
        for row in states:
            t, chances = 0, self.startprob
            while t < num_frames:
                state = chances.multinomial(1, generator=generator)
                duration = int(laws[state[0]].multinomial(1, generator=generator)) + 1
                row[t : t + duration] = state
                t, chances = t + duration, transmat[state[0]]
        return self.emissions.sample(states, generator), states

    def expect(self, x: Tensor, lengths: Tensor) -> tuple[float, hsmm.Posteriors]:
        """The E step."""
        model = (self.startprob, self.transmat, self.durations())
        logs = self.emissions(x, lengths)
        expected = hsmm.smooth(logs, *model, lengths, right_censored=self.right_censored)
        return float(expected.log_likelihood.sum()), expected

    def maximise(self, x: Tensor, lengths: Tensor, expected: object, settings: EM) -> None:
        """The M step."""
        super().maximise(x, lengths, expected, settings)
        if "d" in settings.update:
            self.durations.fit(expected.durations.sum(0))

    @torch.no_grad()
    def fit_labelled(
        self,
        x,
        states,
        lengths=None,
        *,
        pseudo_count: float = 0.0,
        variance_floor: float = 1e-3,
    ) -> None:
        """Set the parameters from given states, as `HMM.fit_labelled`, and durations from runs.

        The last run of each sequence is left out of the durations if the model is right-censored.

        Raises:
            ValueError: as `HMM.fit_labelled`, or a run is longer or shorter than possible.
        """
        settings = {"pseudo_count": pseudo_count, "variance_floor": variance_floor}
        super().fit_labelled(x, states, lengths, **settings)
        batch = self._batch(x, lengths)
        rows = states if isinstance(states, (list, tuple)) else torch.as_tensor(states)
        rows = rows if batch.batched else [rows]
        k = self.num_states
        counts = torch.zeros(k, self.durations.max_duration, dtype=torch.float64)
        steps = torch.full((k, k), pseudo_count, dtype=torch.float64).fill_diagonal_(0)
        for row, length in zip(rows, batch.lengths.tolist(), strict=True):
            values, runs = torch.unique_consecutive(row[:length], return_counts=True)
            steps.index_put_((values[:-1], values[1:]), torch.ones(len(values) - 1).double(), True)
            self._count_runs(values.tolist(), runs.tolist(), counts)
        set_from_counts(self.transmat_logits, steps)
        self.durations.fit(counts)

    def _count_runs(self, values: list[int], runs: list[int], counts: Tensor) -> None:
        shortest, longest = self.durations.min_duration, self.durations.max_duration
        for place, (value, run) in enumerate(zip(values, runs, strict=True), 1):
            cut = self.right_censored and place == len(runs)
            if not (cut or shortest <= run) or run > longest:
                raise ValueError(
                    f"a run of state {value} lasts {run} frames, outside min_duration and "
                    f"max_duration, {shortest} to {longest}"
                )
            counts[value, run - 1] += not cut
