//! How small objects (manifests) are stored: compressed, sealed, and with a
//! hash that shows damage without the key.

use highwater_store::ObjectKey;

use crate::error::Flaw;
use crate::seal::{Cipher, SALT_LEN, Salt, SealKey, Sealer, random};
use crate::wire::{Reader, narrow, wide};

const MAGIC: &[u8; 6] = b"HWSEAL";
const VERSION: u8 = 1;
const CODEC_ZSTD: u8 = 1;
const HEADER_LEN: usize = 48;
const HASH_LEN: usize = 32;
/// A manifest holds a VM's definition and a few records per disk.
const PLAIN_LEN_MAX: u32 = 64 << 20;
/// The whole object: incompressible content and everything around it.
pub(crate) const CONTAINER_LEN_MAX: u64 = (64 << 20) + (1 << 20);
const ZSTD_LEVEL: i32 = 3;

/// What lies in a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ContainerKind {
    Manifest = 1,
}

/// Packs `plain` up for the object `key`. `None` if it is too large.
pub(crate) fn seal(
    kind: ContainerKind,
    key: &ObjectKey,
    seal: Option<&SealKey>,
    plain: &[u8],
) -> Option<Vec<u8>> {
    let salt = random::<SALT_LEN>();
    let sealer = Sealer::for_object(seal, &salt);
    let plain_len = u32::try_from(plain.len())
        .ok()
        .filter(|len| *len <= PLAIN_LEN_MAX)?;
    let mut object = Vec::new();
    object.extend_from_slice(MAGIC);
    object.extend_from_slice(&[
        VERSION,
        kind as u8,
        CODEC_ZSTD,
        sealer.cipher().code(),
        0,
        0,
    ]);
    object.extend_from_slice(&plain_len.to_le_bytes());
    object.extend_from_slice(&salt);
    let aad = associated(&object, key);
    let mut body = zstd::bulk::compress(plain, ZSTD_LEVEL).ok()?;
    let tag = sealer.seal(0, &aad, &mut body);
    object.extend_from_slice(&body);
    object.extend_from_slice(tag.as_ref().map_or(&[], |tag| tag));
    let hash = blake3::hash(&object);
    object.extend_from_slice(hash.as_bytes());
    Some(object)
}

/// Returns what [`seal`] was given, if the object is whole, of this kind, and
/// lies where it was put.
pub(crate) fn open(
    kind: ContainerKind,
    key: &ObjectKey,
    seal: Option<&SealKey>,
    object: &[u8],
) -> Result<Vec<u8>, Flaw> {
    let Parts {
        header,
        cipher,
        plain_len,
        salt,
        body,
    } = take_apart(kind, object)?;
    let sealer = Sealer::for_object(seal, &salt);
    // Or somebody without the key could plant a plain object among sealed ones.
    if cipher != sealer.cipher() {
        return Err(Flaw("its cipher is not the repository's"));
    }
    let mut body = body.to_vec();
    let compressed = sealer.open(0, &associated(header, key), &mut body)?;
    let plain_len = narrow(plain_len.into())?;
    let plain = zstd::bulk::decompress(compressed, plain_len)
        .map_err(|_| Flaw("it cannot be decompressed"))?;
    if plain.len() != plain_len {
        return Err(Flaw("its length is wrong"));
    }
    Ok(plain)
}

/// Checks all that shows without the key: hash and header. That the object lies
/// where it was put, and what is in it, only [`open`] can tell.
pub(crate) fn check_without_key(
    kind: ContainerKind,
    wanted: Cipher,
    object: &[u8],
) -> Result<(), Flaw> {
    if take_apart(kind, object)?.cipher == wanted {
        return Ok(());
    }
    Err(Flaw("its cipher is not the repository's"))
}

struct Parts<'a> {
    header: &'a [u8],
    cipher: Cipher,
    plain_len: u32,
    salt: Salt,
    body: &'a [u8],
}

fn take_apart(kind: ContainerKind, object: &[u8]) -> Result<Parts<'_>, Flaw> {
    if wide(object.len()) > CONTAINER_LEN_MAX {
        return Err(Flaw("it is too large"));
    }
    let (object, hash) = object
        .split_last_chunk::<HASH_LEN>()
        .ok_or(Flaw("it ends too early"))?;
    if blake3::hash(object).as_bytes() != hash {
        return Err(Flaw("its hash does not match"));
    }
    let mut reader = Reader::new(object);
    let header = Reader::new(object).take(HEADER_LEN)?;
    reader.expect(MAGIC, "it is not a sealed object")?;
    reader.expect(&[VERSION], "it has an unknown version")?;
    reader.expect(&[kind as u8], "it is of another kind")?;
    reader.expect(&[CODEC_ZSTD], "its compression is unknown")?;
    let cipher = Cipher::from_code(reader.u8()?).ok_or(Flaw("its cipher is unknown"))?;
    reader.zeroes(2)?;
    let plain_len = reader.u32()?;
    if plain_len > PLAIN_LEN_MAX {
        return Err(Flaw("it is too large"));
    }
    let salt = reader.array()?;
    Ok(Parts {
        header,
        cipher,
        plain_len,
        salt,
        body: reader.rest(),
    })
}

/// The header and the object's own name, so that no object passes for another.
fn associated(header: &[u8], key: &ObjectKey) -> Vec<u8> {
    [header, key.path().as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use highwater_store::ObjectKind;
    use zeroize::Zeroizing;

    use super::*;

    #[test]
    fn an_object_opens_only_whole_and_only_in_its_place() {
        let key = |name: &str| ObjectKey::new(ObjectKind::Point, name).unwrap();
        for secret in [None, Some(SealKey(Zeroizing::new([7; 32])))] {
            let secret = secret.as_ref();
            let kind = ContainerKind::Manifest;
            let good = seal(kind, &key("a/b"), secret, b"manifest").unwrap();
            assert_eq!(open(kind, &key("a/b"), secret, &good).unwrap(), b"manifest");
            for at in 0..good.len() * 8 {
                let mut bad = good.clone();
                bad[at / 8] ^= 1 << (at % 8);
                assert!(open(kind, &key("a/b"), secret, &bad).is_err(), "bit {at}");
            }
            for len in 0..good.len() {
                assert!(
                    open(kind, &key("a/b"), secret, &good[..len]).is_err(),
                    "cut to {len}"
                );
            }
            if secret.is_some() {
                assert!(open(kind, &key("a/c"), secret, &good).is_err(), "moved");
                assert!(
                    open(kind, &key("a/b"), None, &good).is_err(),
                    "without the key"
                );
            }
        }
    }
}
