# SPDX-License-Identifier: Apache-2.0
"""Training parts: callbacks, objectives and optimizers for an unchanged `Trainer`, and subclasses of it.

Nothing here is part of a checkpoint.
"""
