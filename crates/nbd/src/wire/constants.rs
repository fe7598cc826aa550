//! The numbers of the protocol under the names `proto.md` gives them ("Values").

/// First eight bytes of any server ("Newstyle negotiation").
pub const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second eight bytes of a newstyle server, and the start of each option.
pub const NBD_IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// Second eight bytes of an oldstyle server ("Oldstyle negotiation").
pub const NBD_CLISERV_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Start of each reply to an option ("Fixed newstyle negotiation").
pub const NBD_OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Handshake flag: the server speaks fixed newstyle.
pub const NBD_FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag: the server can leave out the zeroes after `NBD_OPT_EXPORT_NAME`.
pub const NBD_FLAG_NO_ZEROES: u16 = 1 << 1;
/// Client flag: we speak fixed newstyle.
pub const NBD_FLAG_C_FIXED_NEWSTYLE: u32 = 1 << 0;
/// Client flag: leave out the zeroes.
pub const NBD_FLAG_C_NO_ZEROES: u32 = 1 << 1;

/// Option: open an export (old, cannot report errors).
pub const NBD_OPT_EXPORT_NAME: u32 = 1;
/// Option: end the handshake.
pub const NBD_OPT_ABORT: u32 = 2;
/// Option: list exports.
pub const NBD_OPT_LIST: u32 = 3;
/// Option: start TLS.
pub const NBD_OPT_STARTTLS: u32 = 5;
/// Option: describe an export.
pub const NBD_OPT_INFO: u32 = 6;
/// Option: open an export.
pub const NBD_OPT_GO: u32 = 7;
/// Option: use structured replies.
pub const NBD_OPT_STRUCTURED_REPLY: u32 = 8;
/// Option: list metadata contexts.
pub const NBD_OPT_LIST_META_CONTEXT: u32 = 9;
/// Option: select metadata contexts.
pub const NBD_OPT_SET_META_CONTEXT: u32 = 10;
/// Option: use extended headers.
pub const NBD_OPT_EXTENDED_HEADERS: u32 = 11;

/// Option reply: accepted, or end of a list.
pub const NBD_REP_ACK: u32 = 1;
/// Option reply: one export of a list.
pub const NBD_REP_SERVER: u32 = 2;
/// Option reply: one fact about an export.
pub const NBD_REP_INFO: u32 = 3;
/// Option reply: one metadata context.
pub const NBD_REP_META_CONTEXT: u32 = 4;
/// Set in each option reply that is an error.
pub const NBD_REP_FLAG_ERROR: u32 = 1 << 31;
/// Option reply: unknown option.
pub const NBD_REP_ERR_UNSUP: u32 = NBD_REP_FLAG_ERROR | 1;
/// Option reply: forbidden by policy.
pub const NBD_REP_ERR_POLICY: u32 = NBD_REP_FLAG_ERROR | 2;
/// Option reply: malformed option.
pub const NBD_REP_ERR_INVALID: u32 = NBD_REP_FLAG_ERROR | 3;
/// Option reply: not on this platform.
pub const NBD_REP_ERR_PLATFORM: u32 = NBD_REP_FLAG_ERROR | 4;
/// Option reply: TLS first.
pub const NBD_REP_ERR_TLS_REQD: u32 = NBD_REP_FLAG_ERROR | 5;
/// Option reply: no such export.
pub const NBD_REP_ERR_UNKNOWN: u32 = NBD_REP_FLAG_ERROR | 6;
/// Option reply: the server is shutting down.
pub const NBD_REP_ERR_SHUTDOWN: u32 = NBD_REP_FLAG_ERROR | 7;
/// Option reply: the client must promise to respect block sizes.
pub const NBD_REP_ERR_BLOCK_SIZE_REQD: u32 = NBD_REP_FLAG_ERROR | 8;
/// Option reply: too much to process.
pub const NBD_REP_ERR_TOO_BIG: u32 = NBD_REP_FLAG_ERROR | 9;
/// Option reply: extended headers first.
pub const NBD_REP_ERR_EXT_HEADER_REQD: u32 = NBD_REP_FLAG_ERROR | 0xa;

/// Information: size and flags of the export.
pub const NBD_INFO_EXPORT: u16 = 0;
/// Information: canonical name.
pub const NBD_INFO_NAME: u16 = 1;
/// Information: description for people.
pub const NBD_INFO_DESCRIPTION: u16 = 2;
/// Information: block sizes.
pub const NBD_INFO_BLOCK_SIZE: u16 = 3;

/// Transmission flag: always set.
pub const NBD_FLAG_HAS_FLAGS: u16 = 1 << 0;
/// Transmission flag: the export is read-only.
pub const NBD_FLAG_READ_ONLY: u16 = 1 << 1;
/// Transmission flag: `NBD_CMD_FLUSH` works.
pub const NBD_FLAG_SEND_FLUSH: u16 = 1 << 2;
/// Transmission flag: `NBD_CMD_FLAG_FUA` works.
pub const NBD_FLAG_SEND_FUA: u16 = 1 << 3;
/// Transmission flag: the export rotates.
pub const NBD_FLAG_ROTATIONAL: u16 = 1 << 4;
/// Transmission flag: `NBD_CMD_TRIM` works.
pub const NBD_FLAG_SEND_TRIM: u16 = 1 << 5;
/// Transmission flag: `NBD_CMD_WRITE_ZEROES` works.
pub const NBD_FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
/// Transmission flag: `NBD_CMD_FLAG_DF` works.
pub const NBD_FLAG_SEND_DF: u16 = 1 << 7;
/// Transmission flag: several connections see one state.
pub const NBD_FLAG_CAN_MULTI_CONN: u16 = 1 << 8;
/// Transmission flag: `NBD_CMD_CACHE` works.
pub const NBD_FLAG_SEND_CACHE: u16 = 1 << 10;
/// Transmission flag: `NBD_CMD_FLAG_FAST_ZERO` works.
pub const NBD_FLAG_SEND_FAST_ZERO: u16 = 1 << 11;
/// Transmission flag: block status may be asked for chosen contexts only.
pub const NBD_FLAG_BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;

/// Command flag: durable before the reply.
pub const NBD_CMD_FLAG_FUA: u16 = 1 << 0;
/// Command flag: write zeroes without a hole.
pub const NBD_CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// Command flag: one content chunk at most.
pub const NBD_CMD_FLAG_DF: u16 = 1 << 2;
/// Command flag: one extent per context.
pub const NBD_CMD_FLAG_REQ_ONE: u16 = 1 << 3;
/// Command flag: fail rather than write zeroes slowly.
pub const NBD_CMD_FLAG_FAST_ZERO: u16 = 1 << 4;
/// Command flag (extended headers): the length is that of a payload.
pub const NBD_CMD_FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// Reply flag: the last chunk of a reply.
pub const NBD_REPLY_FLAG_DONE: u16 = 1 << 0;

/// Chunk: nothing more to say.
pub const NBD_REPLY_TYPE_NONE: u16 = 0;
/// Chunk: bytes.
pub const NBD_REPLY_TYPE_OFFSET_DATA: u16 = 1;
/// Chunk: a hole.
pub const NBD_REPLY_TYPE_OFFSET_HOLE: u16 = 2;
/// Chunk: extents of one metadata context.
pub const NBD_REPLY_TYPE_BLOCK_STATUS: u16 = 5;
/// Chunk (extended headers): extents of one metadata context, 64 bits wide.
pub const NBD_REPLY_TYPE_BLOCK_STATUS_EXT: u16 = 6;
/// Set in the type of each chunk that is an error.
pub const NBD_REPLY_FLAG_ERROR: u16 = 1 << 15;
/// Chunk: the request failed.
pub const NBD_REPLY_TYPE_ERROR: u16 = NBD_REPLY_FLAG_ERROR | 1;
/// Chunk: the request failed at an offset.
pub const NBD_REPLY_TYPE_ERROR_OFFSET: u16 = NBD_REPLY_FLAG_ERROR | 2;

/// Start of a compact request.
pub const NBD_REQUEST_MAGIC: u32 = 0x2560_9513;
/// Start of a simple reply.
pub const NBD_SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Start of a structured reply chunk.
pub const NBD_STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Start of an extended request.
pub const NBD_EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Start of an extended reply chunk.
pub const NBD_EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Bit of `base:allocation`: a hole.
pub const NBD_STATE_HOLE: u64 = 1 << 0;
/// Bit of `base:allocation`: reads as zeroes.
pub const NBD_STATE_ZERO: u64 = 1 << 1;
/// Bit of `qemu:dirty-bitmap:NAME`: dirty.
pub const NBD_STATE_DIRTY: u64 = 1 << 0;

/// Longest string of the protocol ("Conventions").
pub const NBD_MAX_STRING: usize = 4096;
/// Largest payload anybody must take ("Size constraints"); we never ask for more.
pub const PAYLOAD_MAX: u32 = 32 << 20;
/// Largest reply to an option we take: two strings and their lengths fit twice.
pub const OPTION_REPLY_MAX: u32 = 16 * 1024;
/// Largest error chunk we take: a string, its fields, and room for types to come.
pub const ERROR_CHUNK_MAX: u64 = 8 << 10;
/// Most extents of one status chunk ("Structured reply types": 2^20).
pub const STATUS_EXTENTS_MAX: u64 = 1 << 20;
