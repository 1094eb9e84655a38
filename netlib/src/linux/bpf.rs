//! Owns the system call bpf(2): maps, programs, and what is attached at the tcx hooks of a device.
//!
//! tcx (kernel 6.6) rather than a `clsact` queue with filters: one call attaches, replaces or removes exactly one program
//! and nothing of anybody else's, what is attached lives as long as its device, and it is listed by number. A device is
//! one of the calling thread's network namespace. It knows neither our programs nor our maps. No tasks, no channels.
#![allow(unsafe_code, reason = "bpf(2) takes addresses of buffers, and gives descriptors")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// Commands (linux/bpf.h, `enum bpf_cmd`).
const MAP_CREATE: i32 = 0;
const MAP_LOOKUP_ELEM: i32 = 1;
const MAP_UPDATE_ELEM: i32 = 2;
const MAP_DELETE_ELEM: i32 = 3;
const MAP_GET_NEXT_KEY: i32 = 4;
const PROG_LOAD: i32 = 5;
const PROG_ATTACH: i32 = 8;
const PROG_DETACH: i32 = 9;
const PROG_GET_FD_BY_ID: i32 = 13;
const MAP_GET_FD_BY_ID: i32 = 14;
const OBJ_GET_INFO_BY_FD: i32 = 15;
const PROG_QUERY: i32 = 16;

/// `BPF_PROG_TYPE_SCHED_CLS`.
const SCHED_CLS: u32 = 3;
/// `BPF_TCX_INGRESS`.
const TCX_INGRESS: u32 = 46;
/// `BPF_F_REPLACE` of an attachment.
const REPLACE: u32 = 1 << 2;
/// `BPF_F_NO_PREALLOC`: memory by element.
const NO_PREALLOC: u32 = 1;

/// Bytes of a name with its zero (`BPF_OBJ_NAME_LEN`).
const NAME_BYTES: usize = 16;
/// Most programs of others and of ours at one hook that are looked at (the kernel's `BPF_MPROG_MAX` is 64).
const PROGRAMS_MAX: usize = 64;
/// Most maps of a program that are looked at.
const MAPS_MAX: usize = 8;
/// Room for the verifier's words when a program is refused.
const LOG_BYTES: usize = 256 * 1024;
/// Of these, the last so many are told: the reason stands at the end.
const LOG_SHOWN_BYTES: usize = 2_000;

/// What is kept by key.
#[derive(Clone, Copy, Debug)]
pub(super) enum MapKind {
    /// A hash table (`BPF_MAP_TYPE_HASH`).
    Hash,
    /// By longest prefix (`BPF_MAP_TYPE_LPM_TRIE`).
    Prefixes,
    /// Numbered, for each processor (`BPF_MAP_TYPE_PERCPU_ARRAY`).
    PerCpu,
}

/// `union bpf_attr`: zeros, with fields written at their offsets (linux/bpf.h). The kernel takes a larger one than it
/// knows as long as the rest is zero.
#[repr(C, align(8))]
struct Attr([u8; 96]);

impl Attr {
    fn new() -> Self {
        Self([0; 96])
    }

    fn u32(mut self, at: usize, value: u32) -> Self {
        self.0[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        self
    }

    fn fd(self, at: usize, fd: BorrowedFd<'_>) -> Self {
        self.u32(at, fd.as_raw_fd().cast_unsigned())
    }

    fn address<T: ?Sized>(mut self, at: usize, of: *const T) -> Self {
        let address = of.cast::<()>().expose_provenance() as u64;
        self.0[at..at + 8].copy_from_slice(&address.to_ne_bytes());
        self
    }

    fn name(mut self, at: usize, name: &str) -> Self {
        let bytes = &name.as_bytes()[..name.len().min(NAME_BYTES - 1)];
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn read(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.0[at..at + 4].try_into().expect("four bytes"))
    }
}

/// The system call.
///
/// # Safety
/// Every address in `attr` is that of a buffer that is alive, as large as the kernel is told or knows from the map, and
/// may be written where the command writes.
unsafe fn bpf(command: i32, attr: &mut Attr) -> io::Result<i32> {
    // SAFETY: `attr` is alive and of the size that is told; the caller answers for what it points to.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr.0.as_mut_ptr(), attr.0.len()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(i32::try_from(result).unwrap_or_default()) }
}

/// The same for a command that makes a descriptor.
///
/// # Safety
/// As [`bpf`].
unsafe fn bpf_fd(command: i32, attr: &mut Attr) -> io::Result<OwnedFd> {
    // SAFETY: as the caller says; what such a command returns is a new descriptor that nobody else owns.
    unsafe { bpf(command, attr).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

/// A map with keys and values of these sizes in bytes.
pub(super) struct Map {
    fd: OwnedFd,
    key: usize,
    value: usize,
}

impl Map {
    /// Makes one. `max` is the most entries.
    pub(super) fn create(kind: MapKind, name: &str, key: usize, value: usize, max: u32) -> io::Result<Self> {
        let (number, flags) = match kind {
            MapKind::Hash => (1, NO_PREALLOC),
            MapKind::Prefixes => (11, NO_PREALLOC),
            MapKind::PerCpu => (6, 0),
        };
        let size = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
        let mut attr = Attr::new().u32(0, number).u32(4, size(key)).u32(8, size(value)).u32(12, max).u32(16, flags);
        attr = attr.name(28, name);
        // SAFETY: no addresses.
        let fd = unsafe { bpf_fd(MAP_CREATE, &mut attr)? };
        Ok(Self { fd, key, value: kind_value_bytes(kind, value) })
    }

    /// Opens one by its number. Its sizes are what the caller knows its maps to have.
    pub(super) fn open(id: u32) -> io::Result<(Self, String)> {
        // SAFETY: no addresses.
        let fd = unsafe { bpf_fd(MAP_GET_FD_BY_ID, &mut Attr::new().u32(0, id))? };
        // `struct bpf_map_info`: type, id, key_size, value_size, max_entries, map_flags, name.
        let mut info = [0_u8; 40];
        // SAFETY: no addresses inside.
        unsafe { object_info(fd.as_fd(), &mut info)? };
        let word = |at: usize| u32::from_ne_bytes(info[at..at + 4].try_into().expect("four bytes")) as usize;
        let kind = if word(0) == 6 { MapKind::PerCpu } else { MapKind::Hash };
        let (key, value) = (word(8), kind_value_bytes(kind, word(12)));
        Ok((Self { fd, key, value }, text(&info[24..40])))
    }

    fn element(&self, key: &[u8], value: *const u8) -> Attr {
        Attr::new().fd(0, self.fd.as_fd()).address(8, key.as_ptr()).address(16, value)
    }

    fn check(&self, key: &[u8], value: Option<&[u8]>) -> io::Result<()> {
        if key.len() == self.key && value.is_none_or(|value| value.len() == self.value) {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::InvalidInput, "the map has entries of another size"))
    }

    /// Adds or replaces an entry.
    pub(super) fn put(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.check(key, Some(value))?;
        // SAFETY: both slices are alive and have the sizes of the map; the kernel only reads them.
        unsafe { bpf(MAP_UPDATE_ELEM, &mut self.element(key, value.as_ptr())).map(drop) }
    }

    /// Removes an entry.
    pub(super) fn delete(&self, key: &[u8]) -> io::Result<()> {
        self.check(key, None)?;
        // SAFETY: the slice is alive and has the size of the map's keys; the kernel only reads it.
        unsafe { bpf(MAP_DELETE_ELEM, &mut self.element(key, std::ptr::null())).map(drop) }
    }

    /// Reads an entry; of a map for each processor, the values of all, one after the other.
    pub(super) fn get(&self, key: &[u8]) -> io::Result<Vec<u8>> {
        self.check(key, None)?;
        let mut value = vec![0; self.value];
        // SAFETY: the key is alive and of its size; `value` has as many bytes as the kernel writes for this kind of map.
        unsafe { bpf(MAP_LOOKUP_ELEM, &mut self.element(key, value.as_mut_ptr()))? };
        Ok(value)
    }

    /// All entries. Of those that come or go meanwhile some may be missing.
    pub(super) fn entries(&self) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut found = Vec::new();
        let mut key: Option<Vec<u8>> = None;
        loop {
            let mut next = vec![0; self.key];
            let from = key.as_ref().map_or(std::ptr::null(), |key| key.as_ptr());
            let mut attr = Attr::new().fd(0, self.fd.as_fd()).address(8, from).address(16, next.as_mut_ptr());
            // SAFETY: `from` is nothing or a key of the map's size; `next` has room for one.
            match unsafe { bpf(MAP_GET_NEXT_KEY, &mut attr) } {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
                Err(error) => return Err(error),
            }
            match self.get(&next) {
                Ok(value) => found.push((next.clone(), value)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            key = Some(next);
        }
    }

    /// Its descriptor, for the instructions of a program.
    pub(super) fn descriptor(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}

/// Bytes that the kernel reads and writes for a value: of one for each processor, all of them.
fn kind_value_bytes(kind: MapKind, value: usize) -> usize {
    match kind {
        MapKind::PerCpu => value.next_multiple_of(8) * possible_cpus(),
        MapKind::Hash | MapKind::Prefixes => value,
    }
}

/// Processors that this kernel may ever have (`/sys/devices/system/cpu/possible`, such as `0-3`). At least as many as it
/// writes values for: a buffer that is too small would be written beyond its end.
fn possible_cpus() -> usize {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible").unwrap_or_default();
    let last = text.trim().rsplit(['-', ',']).next().and_then(|last| last.parse::<usize>().ok());
    // The largest that the kernel can be built for (CONFIG_NR_CPUS).
    last.map_or(8_192, |last| last + 1)
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// What the kernel says of an object.
///
/// # Safety
/// As [`bpf`], for the addresses inside `info`.
unsafe fn object_info(fd: BorrowedFd<'_>, info: &mut [u8]) -> io::Result<()> {
    let len = u32::try_from(info.len()).expect("a small buffer");
    let mut attr = Attr::new().fd(0, fd).u32(4, len).address(8, info.as_mut_ptr());
    // SAFETY: `info` is alive, and the kernel writes at most the length that it is told; the rest is the caller's.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr).map(drop) }
}

/// A program that is loaded.
pub(super) struct Program {
    fd: OwnedFd,
    /// Its name.
    pub(super) name: String,
    /// Numbers of its maps.
    pub(super) maps: Vec<u32>,
}

impl Program {
    /// Loads one from instructions of 8 bytes each.
    ///
    /// # Errors
    /// The kernel's; with the end of what its verifier says, if that refused it.
    pub(super) fn load(name: &str, instructions: &[[u8; 8]]) -> io::Result<Self> {
        let license = c"Apache-2.0";
        let count = u32::try_from(instructions.len()).expect("a small program");
        let attr = || {
            let attr = Attr::new().u32(0, SCHED_CLS).u32(4, count).address(8, instructions.as_ptr());
            attr.address(16, license.as_ptr()).name(48, name).u32(68, TCX_INGRESS)
        };
        // SAFETY: instructions and license are alive; the kernel reads as many as it is told, and to the zero.
        let plain = unsafe { bpf_fd(PROG_LOAD, &mut attr()) };
        let error = match plain {
            Ok(fd) => return Ok(Self { fd, name: name.to_owned(), maps: Vec::new() }),
            Err(error) => error,
        };
        // Again for its reasons, which cost time to write.
        let mut log = vec![0_u8; LOG_BYTES];
        let size = u32::try_from(LOG_BYTES).expect("256 KiB");
        let mut attr = attr().u32(24, 1).u32(28, size).address(32, log.as_mut_ptr());
        // SAFETY: as above; of `log` the kernel writes at most the size that it is told.
        match unsafe { bpf_fd(PROG_LOAD, &mut attr) } {
            Ok(fd) => Ok(Self { fd, name: name.to_owned(), maps: Vec::new() }),
            Err(_) => {
                let said = text(&log);
                let shown: String = said.chars().skip(said.chars().count().saturating_sub(LOG_SHOWN_BYTES)).collect();
                Err(io::Error::new(error.kind(), format!("{error}; the kernel's verifier says: {}", shown.trim())))
            }
        }
    }

    /// Opens one by its number.
    fn open(id: u32) -> io::Result<Self> {
        // SAFETY: no addresses.
        let fd = unsafe { bpf_fd(PROG_GET_FD_BY_ID, &mut Attr::new().u32(0, id))? };
        // `struct bpf_prog_info`: … nr_map_ids at 52, map_ids at 56, name at 64. The first call says how many maps.
        let mut ids = [0_u32; MAPS_MAX];
        let mut info = [0_u8; 80];
        info[52..56].copy_from_slice(&u32::try_from(MAPS_MAX).expect("8").to_ne_bytes());
        info[56..64].copy_from_slice(&(ids.as_mut_ptr().expose_provenance() as u64).to_ne_bytes());
        // SAFETY: `ids` is alive and has room for as many numbers as `info` says.
        unsafe { object_info(fd.as_fd(), &mut info)? };
        let count = u32::from_ne_bytes(info[52..56].try_into().expect("four bytes")) as usize;
        let maps = ids.iter().take(count).copied().collect();
        Ok(Self { fd, name: text(&info[64..80]), maps })
    }

    /// Attaches it to packets that come in by a device, in the place of `old` if that is there.
    pub(super) fn attach(&self, index: u32, old: Option<&Self>) -> io::Result<()> {
        let mut attr = Attr::new().u32(0, index).fd(4, self.fd.as_fd()).u32(8, TCX_INGRESS);
        if let Some(old) = old {
            attr = attr.u32(12, REPLACE).fd(16, old.fd.as_fd());
        }
        // SAFETY: no addresses.
        unsafe { bpf(PROG_ATTACH, &mut attr).map(drop) }
    }

    /// Detaches it from a device.
    pub(super) fn detach(&self, index: u32) -> io::Result<()> {
        let mut attr = Attr::new().u32(0, index).fd(4, self.fd.as_fd()).u32(8, TCX_INGRESS);
        // SAFETY: no addresses.
        unsafe { bpf(PROG_DETACH, &mut attr).map(drop) }
    }

    /// The programs that are attached to packets that come in by a device.
    ///
    /// # Errors
    /// EINVAL where the kernel knows no tcx.
    pub(super) fn attached(index: u32) -> io::Result<Vec<Self>> {
        let mut ids = [0_u32; PROGRAMS_MAX];
        let count = u32::try_from(PROGRAMS_MAX).expect("64");
        let mut attr = Attr::new().u32(0, index).u32(4, TCX_INGRESS).address(16, ids.as_mut_ptr()).u32(24, count);
        // SAFETY: `ids` is alive and has room for as many numbers as the kernel is told.
        unsafe { bpf(PROG_QUERY, &mut attr)? };
        let found = ids.iter().take(attr.read(24) as usize).filter(|id| **id != 0);
        // One that is gone a moment later is not attached.
        Ok(found.filter_map(|id| Self::open(*id).ok()).collect())
    }
}
