"""The hardware side: the only room that may import torch, triton or cuda."""
