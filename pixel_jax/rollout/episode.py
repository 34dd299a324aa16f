"""One conversation as a state machine: sampled ids in, "what next" out.  Host, no jax.

  feed(ids, logp, ended) -> "decode"   the turn is not over
                         -> "operate"  it ends in a call: run `operate`, in any thread
                         -> "done"     `trajectory.stop` says why
  operate()              -> True       the observation was appended; decode on
                         -> False      it does not fit; done

Why it stops: "answer", a turn that calls nothing; "turns", a call in the last turn that
is allowed, which is not run; "length", a turn that does not end within its budget, or an
observation (or a question: `refuse`) that does not fit; "row", what would fit, but not into
a row of training.  Nothing that was said is ever dropped: the call whose observation had no
room keeps its turn, and has the error "no_room".

Not here: slots, caches, how an operation works.
"""

from collections.abc import Collection, Iterator, Sequence

from pixel_jax.chat.encode import Conversation
from pixel_jax.pixels.geometry import Pixels


def overflow(
  tokens: int,
  patches: Collection[int],
  *,
  max_len: int,
  max_patches: int,
  row: tuple[int, int] | None,
) -> str:
  """Why a conversation has no room for another token, as it stops by; "" where it has.

  Args:
    tokens: that it has.
    patches: of each of its pictures.
    max_len, max_patches, row: as in `Episode`.
  """
  if tokens >= max_len or max(patches, default=0) > max_patches:
    return "length"
  if row and (tokens >= row[0] or sum(patches) > row[1]):
    return "row"
  return ""


class Episode:
  """A conversation that is being played.

  Args:
    conversation: ends in the generation prompt; belongs to the episode from now on.
    max_len: ids of the whole conversation at most.
    max_patches: of a picture at most.
    max_turns: turns of the policy; the last of them cannot operate.
    max_new_tokens: of one turn.
    row: tokens, and patches of distinct pictures, that the whole may have; None = any.
    operations: False runs none, so that a call ends the episode as in the last turn.
    script: ids that the policy is made to say, turn by turn; beyond them it is free.
  """

  def __init__(
    self,
    conversation: Conversation,
    *,
    max_len: int,
    max_patches: int,
    max_turns: int,
    max_new_tokens: int,
    row: tuple[int, int] | None = None,
    operations: bool = True,
    script: Sequence[Sequence[int]] = (),
  ):
    if min(max_turns, max_new_tokens) < 1:
      raise ValueError(f"{max_turns=}, {max_new_tokens=}: both must be positive.")
    self.conversation = conversation
    self._limits = dict(max_len=max_len, max_patches=max_patches, row=row)
    self._most = min(max_len, row[0]) if row else max_len
    self._max_turns, self._operations = max_turns, operations
    self._max_new_tokens = max_new_tokens
    self._script = script
    self._turns = 0  # that have ended
    self._turn: tuple[list[int], list[float]] = ([], [])  # ids, log-probs so far

  @property
  def ids(self) -> list[int]:
    """What was said so far, but for the turn in progress."""
    return self.conversation.trajectory.ids

  @property
  def positions(self) -> list[tuple[int, int, int]]:
    return self.conversation.trajectory.position

  @property
  def fits(self) -> bool:
    """Whether the pictures are small enough, and one token has room."""
    return not self._overflow(self.conversation)

  def _overflow(self, conversation: Conversation) -> str:
    """Why a conversation has no room for another token; "" where it has."""
    sizes = {p.key: p.num_patches for p in conversation.pixels}
    return overflow(len(conversation.trajectory.ids), sizes.values(), **self._limits)

  def shown(self, begin: int, end: int) -> Iterator[tuple[int, Pixels]]:
    """(first placeholder, picture) of the pictures that stand in ids[begin:end]."""
    for slot, pixels in zip(
      self.conversation.trajectory.slots, self.conversation.pixels
    ):
      if slot.start < end and begin < slot.start + slot.length:
        yield slot.start, pixels

  @property
  def budget(self) -> int:
    """Tokens that the turn in progress may still have."""
    turn = len(self._turn[0])
    room = self._most - len(self.ids) - turn
    return max(0, min(self._max_new_tokens - turn, room))

  @property
  def forced(self) -> Sequence[int]:
    """What the turn that begins now is made to say."""
    return self._script[self._turns] if self._turns < len(self._script) else ()

  def feed(self, ids: Sequence[int], logp: Sequence[float], ended: bool) -> str:
    """Takes what was sampled; `ended` says that the last id ends the turn."""
    self._turn[0].extend(ids)
    self._turn[1].extend(logp)
    if not ended and self.budget:
      return "decode"
    self.conversation.add_sampled(*self._turn)
    self._turn = ([], [])
    self._turns += 1
    if not ended:
      return self._done(self._overflow(self.conversation) or "length")
    if self.conversation.last_call() is None:
      return self._done("answer")
    if self._turns == self._max_turns or not self._operations:
      return self._done("turns")
    return "operate"

  def operate(self) -> bool:
    """Runs the call of the turn; False when its observation does not fit."""
    observation = self.conversation.call_of_last_turn()
    longer = self.conversation.fork(self.conversation.trajectory.sample)
    longer.observe(observation)
    if why := self._overflow(longer):
      self.conversation.trajectory.calls[-1].error = "no_room"
      self._done(why)
      return False
    self.conversation = longer
    return True

  def refuse(self) -> None:
    """Ends the episode before its first turn, because the question does not fit."""
    self._done(self._overflow(self.conversation))

  def _done(self, stop: str) -> str:
    self.conversation.finish(stop)
    return "done"
