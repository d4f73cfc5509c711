"""The embedded reference pair: training code and trained checkpoints."""
