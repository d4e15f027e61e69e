-- @include kept_ms
-- @include token_length
-- Tell whether the call whose answer is kept in a user's list from first on (see split_sids) may be sent again. The
-- answer begins, behind its token, with the time in us, of which these are the digits down to the ms.
local function is_recent(list, first, now_ms)
  local answered_at = list:sub(first + token_length, first + token_length + 12)
  return answered_at ~= '' and now_ms - answered_at < tonumber(kept_ms)
end
