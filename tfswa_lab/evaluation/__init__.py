"""From a model to scores over whole songs.

>>> import torch
>>> from tfswa_lab.evaluation import usdr
>>> stems = torch.ones(1, 2, 1000)
>>> usdr(stems, 0.9 * stems).round()
tensor([20.], dtype=torch.float64)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "bsseval": ["BSSEval", "bss_eval", "bss_eval_mono", "gnsdr", "gsar", "gsir", "score_clip"],
        "estimates": ["FolderEstimates", "ModelEstimates"],
        "evaluate": ["evaluate"],
        "oracles": ["BOUNDS", "ideal_ratio_mask", "multichannel_wiener"],
        "ratios": ["sdr", "si_sdr", "usdr"],
        "report": ["Report", "load_report"],
        "scoring": ["Evaluation"],
    },
)
