# SPDX-License-Identifier: Apache-2.0
"""Training parts that plug into an unchanged `Trainer`. Nothing here is part of a checkpoint."""
