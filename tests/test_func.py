"""The layer under torch.func: gradients, and one gradient a sample, against float64 in plain torch."""

import warnings

import pytest
import torch
from cases import make_inputs
from torch.func import functional_call, grad, vmap

from flex_kernels import flex_moe
