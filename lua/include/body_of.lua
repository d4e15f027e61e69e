-- The body of a record, which is what a game keeps of its members; see split_record.
local function body_of(record)
  local colon = string.find(record, ':', 1, true)
  return string.sub(record, colon + 1 + string.sub(record, 1, colon - 1))
end
