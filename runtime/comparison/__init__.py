"""All contenders compared on one trace: `python -m runtime.comparison TRACE`.

settings       the options; docs/protocol.md says what they mean
split          documents to fit on, and documents to compare on
contenders     everything that `runtime.simulation` can run, and which of it are free rules
counts         what a contender did in each step
figures        its figures over all steps, and over those of each label
table, picture the figures printed and drawn
leaderboard    a file of figures that others can add to; `leaderboard_command` merges and prints it
"""
