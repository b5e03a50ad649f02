"""Imported by the server that children fork from: what a process pays once (about a second of imports in the first
capture) is paid here, so that the seconds of a network are its own."""

import warnings

import torch
from torch import nn

import dslify

torch.set_num_threads(1)  # a pool of threads that was started here would be missing in the children, which then hang
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    dslify.insert(nn.Sequential(nn.Conv1d(1, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3)), "0", 0.5, (torch.zeros(1, 1, 16),))
