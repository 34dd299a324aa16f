import dataclasses
@dataclasses.dataclass
class Cost: pass
def train(*a,**k): return None
