"""Adaptation: what `expertflow adapt` gains by tokens, and corrections learnt online.

__main__  adapt to traces with more and more tokens
page      tables of its JSON
online    corrections of the forecast, learnt between steps, on top of predicted reuse
"""
