"""The reference pair: how it is trained, measured and damaged. Not installed with Holdfast."""
