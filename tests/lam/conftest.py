import pytest
import torch

from lamkernels.lam import DataConfig, FrameData


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def moving_square():
    """A square that moves left, right or not at all: frames as the emulator gives them, without an emulator."""
    generator = torch.Generator().manual_seed(0)
    count, episode = 240, 60
    actions = torch.randint(3, (count,), generator=generator)
    starts = torch.arange(count) % episode == 0
    frames = torch.full((count, 3, 32, 32), 40, dtype=torch.uint8)
    place = 12
    for t in range(count):
        place = 12 if starts[t] else (place + 4 * (int(actions[t - 1]) - 1)) % 24
        frames[t, :, 12:20, place : place + 8] = 220
    actions[torch.cat([starts[1:], torch.tensor([True])])] = -1
    config = DataConfig(game="pong", transitions=count - count // episode, size=32)
    return FrameData(frames, actions, starts, ("LEFT", "NOOP", "RIGHT"), config)
