"""The network's mathematics where the plain form is slow or saves too much for the backward pass.

Each file has the plain formula beside it, `plain_...`, which a test compares with: same values, same gradients.
"""
