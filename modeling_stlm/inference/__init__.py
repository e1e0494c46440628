# SPDX-License-Identifier: Apache-2.0
"""Ways to run a model that are not part of a checkpoint."""
