"""Reinforcement learning from a reward: one loop for PPO, GRPO and RLOO.

    prompts -> answers of the policy -> their scores -> what each token was worth -> a few steps that make the better
    ones likelier                                       (Ziegler et al. 2019; Stiennon et al. 2020; Ouyang et al. 2022)

The algorithms differ in how advantages are estimated, and nowhere else. Every rank holds the whole iteration: what a
model must compute is shared out and summed (`Learner`), the rest is plain code on global data.
"""

from __future__ import annotations

from rlhf.learner import Learner
from rlhf.session import Session


def ppo(learner: Learner, session: Session) -> None:
    """Train to the last iteration, from the newest checkpoint if there is one, and publish the policy.

    Raises:
        DivergedError: a limit was crossed, or a guard refused too many steps; the last checkpoint is intact.
        StoppedError: a signal arrived on some rank; the state is saved.
        InputError: the checkpoint is of another run, or damaged.
    """
    config = learner.config
    with session:
        while True:
            if learner.held_out and session.is_due(config.eval.every, at_start=True):
                with session.phase("evaluation"):
                    looked = learner.look(learner.held_out)
                session.show(looked)

            if session.is_over:
                break
            iteration = session.iteration

            with session.phase("rollout"):
                prompts = learner.prompts.next(config.rollout.prompts)
                samples = learner.sample(prompts, config.rollout.samples)
            with session.phase("score"):
                trajectory, raw = learner.score(prompts, samples)
            with session.phase("logprob"):
                trajectory = learner.read(trajectory, iteration)
            with session.phase("advantage"):
                trajectory = learner.estimate(trajectory)
            with session.phase("update"):
                report = learner.update(trajectory, iteration)

            session.advance()
            session.log(prompts, samples, trajectory, raw, report)
            if session.is_due(config.checkpoint.every):
                session.save()

        session.publish()
