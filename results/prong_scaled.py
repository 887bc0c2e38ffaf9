"""A control for PRONG: U is the same multiple of the identity, so that nothing is whitened.

    python results/prong_scaled.py --total-iterations 10000       # the flags are those of prong.py

Centring and the larger steps in W, of which U = (Sigma + epsilon)^-1/2 has epsilon^-1/2 at most in
every direction, remain. What PRONG does better than this is due to whitening.
"""

import sys
from pathlib import Path

import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import prong


def scaled(h: Tensor, epsilon: float) -> tuple[prong.Whitening, Tensor]:
    white, lambda_ = whitened(h, epsilon)
    return white._replace(gain=torch.zeros_like(white.gain)), lambda_


whitened, prong.estimate_whitening = prong.estimate_whitening, scaled

if __name__ == "__main__":
    print(prong.main(tyro.cli(prong.Args, description=__doc__)))
