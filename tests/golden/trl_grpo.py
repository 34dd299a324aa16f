"""Records tests/golden/trl_grpo.npz: loss and gradient by TRL's own `_compute_loss`.

  pip install --no-deps --target /tmp/trl trl accelerate datasets ...
  PYTHONPATH=/tmp/trl python tests/golden/trl_grpo.py

The trainer is a stub that holds the settings; the formula that runs is TRL's.
"""

import collections
import pathlib
import types

import numpy as np
import torch
import trl
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import nanstd

CASES = {  # name -> loss_type, beta (KL), importance-sampling cap
  "dapo": ("dapo", 0.0, 0.0),
  "bnpo": ("bnpo", 0.0, 0.0),
  "kl": ("dapo", 0.05, 0.0),
  "sampler": ("dapo", 0.0, 2.0),
}


class Stub:
  def __init__(self, logp, loss_type, beta, use_vllm):
    self._logp = logp
    self.loss_type, self.beta, self.use_vllm = loss_type, beta, use_vllm
    self.epsilon_low, self.epsilon_high = 0.2, 0.28
    self.importance_sampling_level = "token"
    self.top_entropy_quantile = 1.0
    self.off_policy_mask_threshold = None
    self.vllm_importance_sampling_correction = True
    self.aux_loss_enabled = self._entropy_bonus_enabled = False
    self.current_gradient_accumulation_steps = 1
    self.args = types.SimpleNamespace(
      delta=None, use_bias_correction_kl=False, steps_per_generation=1
    )
    self.model = types.SimpleNamespace(training=True)
    self._metrics = {"train": collections.defaultdict(list)}
    self.accelerator = types.SimpleNamespace(
      num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
    )

  def _get_per_token_logps_and_entropies(self, *args, **kwargs):
    return self._logp, torch.zeros_like(self._logp), None


def main():
  rng = np.random.default_rng(0)
  B, T = 8, 12
  old = -rng.exponential(1.0, (B, T)).astype(np.float32)
  logp = old + rng.normal(0, 0.3, (B, T)).astype(np.float32)
  sampler = old + rng.normal(0, 0.5, (B, T)).astype(np.float32)
  reference = old + rng.normal(0, 0.3, (B, T)).astype(np.float32)
  mask = (np.arange(T) < rng.integers(3, T + 1, (B, 1))).astype(np.float32)
  reward = rng.choice([0.0, 1.0, 1.0875, 0.95], (2, 4)).astype(np.float32)
  reward_t = torch.tensor(reward)
  centred = reward_t - reward_t.mean(dim=1, keepdim=True)
  normed = centred / (nanstd(reward_t, dim=1)[:, None] + 1e-4)
  out = dict(
    version=np.array(trl.__version__),
    logp=logp,
    old=old,
    sampler=sampler,
    mask=mask,
    reference=reference,
    reward=reward,
    centred=centred.numpy(),
    normed=normed.numpy(),
  )
  for name, (loss_type, beta, cap) in CASES.items():
    x = torch.tensor(logp, requires_grad=True)
    stub = Stub(x, loss_type, beta, bool(cap))
    ids = torch.zeros(B, 1, dtype=torch.long)
    inputs = dict(
      prompt_ids=ids,
      prompt_mask=ids + 1,
      completion_ids=ids.expand(B, T),
      completion_mask=torch.tensor(mask),
      advantages=normed.reshape(-1),
      old_per_token_logps=torch.tensor(old),
      ref_per_token_logps=torch.tensor(reference),
      num_items_in_batch=torch.tensor(mask.sum()),
      importance_sampling_ratio=torch.exp(torch.tensor(old - sampler)).clamp(max=cap),
    )
    loss = GRPOTrainer._compute_loss(stub, None, inputs)
    loss.backward()
    out[f"{name}/loss"] = loss.detach().numpy()
    out[f"{name}/grad"] = x.grad.numpy()
    clipped = stub._metrics["train"]["clip_ratio/region_mean"]
    out[f"{name}/clip_fraction"] = np.array(clipped[0], np.float32)
  path = pathlib.Path(__file__).with_suffix(".npz")
  np.savez_compressed(path, **out)
  print(path, {k: float(v) for k, v in out.items() if v.ndim == 0 and k != "version"})


if __name__ == "__main__":
  main()
