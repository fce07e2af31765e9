"""The authors of a microbatch, and sums over their samples."""

import torch


class AuthorIndex:
    """The authors of a microbatch.

    Args:
        author: int64 (samples,), ascending: 0 to count - 1, each at least once.
        count: number of authors.
    Raises:
        ValueError: for any other order, which would clip samples of one author as those of several; on a GPU seen only where
            an author has several samples, as looking would cost a wait.
    """

    def __init__(self, author: torch.Tensor, count: int):
        self.author, self.count = author, count
        if author.device.type == "cpu" or count < len(author):
            jumps = torch.cat([author[:1] + 1, author.diff(), count - author[-1:]])  # 0 to the same author, 1 to the next
            if not (len(author) and (jumps[[0, -1]] == 1).all() and ((jumps == 0) | (jumps == 1)).all()):
                raise ValueError(f"authors must be ascending, 0 to {count - 1}, each at least once: {author.tolist()}")
        self._scratch: dict[torch.dtype, torch.Tensor] = {}
        self.several = count < len(author)
        if self.several:
            counts = torch.bincount(author, minlength=count)
            self.place = torch.arange(len(author), device=author.device) - (counts.cumsum(0) - counts)[author]
            self.most = int(counts.max())

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Line up each author's samples: (samples, tokens, ...) to (authors, tokens of all, ...), zeros at the end."""
        if not self.several:
            return tensor
        if self.count * self.most == len(tensor):  # all have as many: nothing to move
            return tensor.unflatten(0, (self.count, self.most)).flatten(1, 2)
        rows = tensor.new_zeros(self.count, self.most, *tensor.shape[1:])
        rows[self.author, self.place] = tensor
        return rows.flatten(1, 2)

    def scale(self, tensor: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Return (samples, tokens, ...) times the factor of each sample's author, until the next call overwrites it.

        New memory for each would cost as much time as the matrix product that follows. What is not float32 is rounded once more.
        """
        scratch = self._scratch.get(tensor.dtype)
        if scratch is None or len(scratch) < tensor.numel():
            scratch = self._scratch[tensor.dtype] = torch.empty_like(tensor).flatten()
        return torch.mul(tensor, factors[self.author].view(-1, 1, 1), out=scratch[: tensor.numel()].view_as(tensor))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over each author's samples: (samples, ...) to float32 (authors, ...)."""
        tensor = tensor.float()
        return tensor.new_zeros(self.count, *tensor.shape[1:]).index_add_(0, self.author, tensor) if self.several else tensor
