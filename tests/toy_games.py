"""Small pixel games for the tests; "toy_games:Side-v0" makes gymnasium import this file."""

import gymnasium as gym
import numpy as np


class Side(gym.Env):
    """A bright block left or right; the action that names its side earns 1; ten steps a game."""

    observation_space = gym.spaces.Box(0, 255, (84, 84), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def screen(self) -> np.ndarray:
        self.side = int(self.np_random.integers(2))
        screen = np.zeros((84, 84), np.uint8)
        screen[20:64, 42 * self.side : 42 * self.side + 42] = 255
        return screen

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.screen(), {}

    def step(self, action):
        self.t += 1
        reward = float(action == self.side)
        return self.screen(), reward, self.t == 10, False, {}


class Clock(gym.Env):
    """Screen t shows t everywhere; step t earns t. It ends after `length` steps, in either way."""

    observation_space = gym.spaces.Box(0, 255, (84, 84), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, length: int = 7, truncates: bool = False):
        self.length, self.truncates = length, truncates

    def screen(self) -> np.ndarray:
        return np.full((84, 84), self.t, np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.screen(), {}

    def step(self, action):
        self.t += 1
        over = self.t == self.length
        return (
            self.screen(),
            float(self.t),
            over and not self.truncates,
            over and self.truncates,
            {},
        )


class Catch(gym.Env):
    """A ball falls through twelve rows, slantwise; the paddle below earns 1 for it, a miss -1."""

    observation_space = gym.spaces.Box(0, 255, (84, 84), np.uint8)
    action_space = gym.spaces.Discrete(3)  # left, stay, right

    def screen(self) -> np.ndarray:
        cells = np.zeros((12, 12), np.uint8)
        cells[self.row, self.column] = cells[11, self.paddle] = 255
        return cells.repeat(7, 0).repeat(7, 1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.row, self.column, self.paddle = 0, int(self.np_random.integers(12)), 6
        self.drift = int(self.np_random.integers(-1, 2))
        return self.screen(), {}

    def step(self, action):
        self.paddle = min(11, max(0, self.paddle + int(action) - 1))
        self.row += 1
        if self.row % 2:  # a cell aside in every second row, and off the walls
            if not 0 <= self.column + self.drift <= 11:
                self.drift = -self.drift
            self.column += self.drift
        over = self.row == 11
        reward = (1.0 if self.column == self.paddle else -1.0) if over else 0.0
        return self.screen(), reward, over, False, {}


class Crashing(Side):
    """Like Side until its third step, which divides by zero."""

    def step(self, action):
        return super().step(action / (2 - self.t))


class Colour(Side):
    """Its screens have a shape that no script takes."""

    observation_space = gym.spaces.Box(0, 255, (84, 84, 3), np.uint8)


class Analogue(Side):
    """Its actions are no finite set."""

    action_space = gym.spaces.Box(-1, 1, (2,))


class Broken(Side):
    """It cannot be made, for a reason of its own."""

    def __init__(self):
        raise RuntimeError("no screen")


for game in (Side, Clock, Catch, Crashing, Colour, Analogue, Broken):
    gym.register(f"{game.__name__}-v0", f"toy_games:{game.__name__}")
gym.register("TruncatedClock-v0", "toy_games:Clock", kwargs={"truncates": True})
