"""Hidden Markov models: inference, models that learn, explicit durations, networks as emissions.

What every function of this room promises:

- `log_emissions` `(b, t, k)`, `startprob` `(k)`, `transmat` `(k, k)` or `(b, t - 1, k, k)`,
  `lengths` `(b)`. Without the axis `b`, results have none. float32 and float64; half precision is
  computed, and returned, in float32.
- Padding may hold anything. There, probabilities and gradients are 0, states are -1.
- -inf and a probability of 0 are exact: a forbidden step stays forbidden.
- A sequence of probability 0 has log-likelihood -inf. Asked for its posteriors or its best path, a
  `ValueError` names the sequence and the first frame that no path reaches.
- A frame of NaN is missing and counts for nothing; so does a single NaN feature, if the Gaussians
  have diagonal covariance.
- All engines give the same, and a sequence gives the same in any batch, up to rounding.
- What cannot be (a length of 0, a row that does not sum to 1 within 1e-4, a symbol out of range)
  is a `ValueError` with its place and value.

Notebook: 11_hmm
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["hsmm"],
    submod_attrs={
        "em": ["EM", "History"],
        "exchange": ["from_hmmlearn", "load", "save", "to_hmmlearn"],
        "hmm": ["CategoricalHMM", "GaussianHMM", "MixtureGaussianHMM"],
        "hsmm_models": ["GaussianHSMM"],
        "inference": ["filter", "log_likelihood", "posteriors", "sample_paths", "viterbi"],
        "neural": ["NeuralHMM"],
        "padding": ["BucketSampler", "collate_padded", "pad_sequences"],
    },
)
