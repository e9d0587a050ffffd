"""Models and runs as files: written whole, and read without trust in whoever wrote them.

What a hostile file can do at most, be it a checkpoint or a run's last.pt:

- No code that it brings along is run, and nothing is written because of it.
- It costs at most three times its size in memory, and time in proportion. Only the numbers, names
  and lists in it, which are few in an honest file, cost more: some seconds and 250 MB for each MB
  of them, and from ten million of them on a file is refused.
- Whatever is wrong with it, the answer is one line that starts with "error: ".
- What is printed of it is short, and free of the codes by which a text controls a terminal.

PyTorch's loader keeps the first promise, archive.py the second, checkpoint.py the others. For the
models of other libraries that a run can start from, pretrained.py keeps all four. For files of
safetensors that package, which weights_file.py calls, keeps the first two. Every other input that
is not trusted is checked in one place, too: a run's last.pt in run_state.py, calls of optimizers
and schedules in optimizers/calls.py, pictures in data/pictures.py, prepared images in
data/cache.py, history.json and timings in analysis/, what --config names in settings.py. Published
data files must have their known checksums.
"""
