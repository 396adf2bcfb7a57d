//! Where a guest offset is described, and what the description says: L1 entries, L2 entries, extended L2 entries.

/// Bits 9 to 55: an offset into the file.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 63: the refcount is exactly one.
pub(super) const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry.
const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard L2 entry.
pub(super) const ZERO: u64 = 1;
/// Subclusters of a cluster with extended L2 entries.
const SUBCLUSTERS: u64 = 32;

/// The numbers that addresses are computed from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub version: u32,
    /// 9 to 21.
    pub cluster_bits: u32,
    /// Whether L2 entries are extended.
    pub extended: bool,
    /// Bytes of the disk, less than 2^63.
    pub size: u64,
}

impl Layout {
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an L2 entry.
    pub fn entry_size(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    pub fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.entry_size()
    }

    /// Bytes of the disk that one L2 table describes; at most 2^39.
    pub fn table_span(&self) -> u64 {
        self.cluster_size() * self.l2_entries()
    }

    /// L1 entries that the disk needs.
    pub fn l1_entries(&self) -> u64 {
        self.size.div_ceil(self.table_span())
    }

    pub fn l1_index(&self, offset: u64) -> u64 {
        offset / self.table_span()
    }

    pub fn l2_index(&self, offset: u64) -> u64 {
        offset / self.cluster_size() % self.l2_entries()
    }

    /// First byte of the disk after the cluster that holds `offset`, not past the disk.
    pub fn cluster_end(&self, offset: u64) -> u64 {
        (offset / self.cluster_size() + 1).saturating_mul(self.cluster_size()).min(self.size)
    }

    /// First byte of the disk after the L2 table that describes `offset`, not past the disk.
    pub fn table_end(&self, offset: u64) -> u64 {
        (self.l1_index(offset) + 1).saturating_mul(self.table_span()).min(self.size)
    }

    /// Offset of the L2 table an L1 entry names, `None` if there is none.
    pub fn l2_table(&self, entry: u64) -> Result<Option<u64>, String> {
        if entry & !(OFFSET | COPIED) != 0 {
            return Err(format!("{entry:#018x} has reserved bits set"));
        }
        self.host(entry)
    }

    fn host(&self, entry: u64) -> Result<Option<u64>, String> {
        let host = entry & OFFSET;
        if host == 0 {
            // Cluster 0 is the header: it can hold no data without an external data file.
            return if entry & COPIED == 0 {
                Ok(None)
            } else {
                Err(format!("{entry:#018x} has offset 0 and bit 63 set"))
            };
        }
        if !host.is_multiple_of(self.cluster_size()) {
            return Err(format!("{entry:#018x}: offset {host} is not a multiple of a cluster"));
        }
        Ok(Some(host))
    }

    /// What an L2 entry says; `bitmap` is its second half if entries are extended.
    pub fn cluster(&self, entry: u64, bitmap: u64) -> Result<Cluster, String> {
        if entry & COMPRESSED != 0 {
            return self.compressed(entry);
        }
        let flag = if self.version >= 3 && !self.extended { ZERO } else { 0 };
        if entry & !(OFFSET | COPIED | flag) != 0 {
            return Err(format!("{entry:#018x} has reserved bits set"));
        }
        let host = self.host(entry)?;
        if self.extended {
            let (allocated, zero) = (bitmap as u32, (bitmap >> 32) as u32);
            if allocated & zero != 0 {
                return Err(format!("bitmap {bitmap:#018x} has subclusters both allocated and zero"));
            }
            return match host {
                None if allocated != 0 => {
                    Err(format!("bitmap {bitmap:#018x} has allocated subclusters without an offset"))
                }
                Some(host) if allocated == u32::MAX => Ok(Cluster::Data { host }),
                _ if zero == u32::MAX => Ok(Cluster::Zero { host }),
                _ if bitmap == 0 => Ok(Cluster::Absent),
                host => Ok(Cluster::Split { host: host.unwrap_or_default(), allocated, zero }),
            };
        }
        Ok(match host {
            host if entry & ZERO != 0 => Cluster::Zero { host },
            Some(host) => Cluster::Data { host },
            None => Cluster::Absent,
        })
    }

    /// Section "Compressed Clusters Descriptor".
    fn compressed(&self, entry: u64) -> Result<Cluster, String> {
        if entry & COPIED != 0 {
            return Err(format!("{entry:#018x} is compressed and has bit 63 set"));
        }
        let x = 62 - (self.cluster_bits - 8);
        let host = entry & ((1 << x) - 1);
        let sectors = ((entry & (COMPRESSED - 1)) >> x) + 1;
        if host >> 56 != 0 || host < self.cluster_size() {
            return Err(format!("{entry:#018x}: offset {host} cannot hold a compressed cluster"));
        }
        // At most twice a cluster: the field has cluster_bits - 8 bits of 512 bytes each.
        Ok(Cluster::Compressed { host, length: sectors * 512 - host % 512 })
    }
}

/// What an L2 entry says of a guest cluster. Hosts are bytes from the start of the file, not yet checked against its
/// length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cluster {
    /// The backing file shows through.
    Absent,
    /// Zeros; the cluster at `host` is kept for later writes.
    Zero { host: Option<u64> },
    /// A whole cluster at `host`.
    Data { host: u64 },
    /// Up to `length` bytes at `host` decompress to the cluster; the file may end sooner.
    Compressed { host: u64, length: u64 },
    /// One bit for each subcluster, the lowest for the first; neither bit: the backing file shows through.
    Split { host: u64, allocated: u32, zero: u32 },
}

/// What a byte of the disk is, and with it those that follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Through,
    Zero,
    /// The byte lies at `.0` in the file.
    Data(u64),
    Compressed {
        host: u64,
        length: u64,
    },
}

impl Cluster {
    /// The state of the byte at `within` its cluster, and how many bytes from there have the same within the cluster.
    pub fn state(self, within: u64, layout: &Layout) -> (State, u64) {
        let rest = layout.cluster_size() - within;
        match self {
            Cluster::Absent => (State::Through, rest),
            Cluster::Zero { .. } => (State::Zero, rest),
            Cluster::Data { host } => (State::Data(host.saturating_add(within)), rest),
            Cluster::Compressed { host, length } => (State::Compressed { host, length }, rest),
            Cluster::Split { host, allocated, zero } => {
                let unit = layout.cluster_size() / SUBCLUSTERS;
                let first = within / unit;
                let bits = |index: u64| ((allocated >> index) & 1, (zero >> index) & 1);
                let same =
                    (first..SUBCLUSTERS).take_while(|&index| bits(index) == bits(first)).count() as u64;
                let state = match bits(first) {
                    (0, 0) => State::Through,
                    (0, _) => State::Zero,
                    _ => State::Data(host.saturating_add(within)),
                };
                (state, (first + same) * unit - within)
            }
        }
    }
}
