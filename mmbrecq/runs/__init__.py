"""What a run keeps: checkpoints, the journal that a resumed run reads, and facts about the run."""
